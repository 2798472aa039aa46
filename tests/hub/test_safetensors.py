"""The format against the safetensors library and torch, and against hostile files."""

import json
import os
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxft.hub.safetensors import DTYPES, SafetensorsError, SafetensorsFile
from jaxft.hub.safetensors_writer import write_safetensors

RNG = np.random.default_rng(7)


def build(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list, *offsets: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def random_array(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if dtype == np.bool_:
        return RNG.random(shape) < 0.5
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return RNG.integers(info.min, info.max, shape, dtype, endpoint=True)
    return RNG.standard_normal(shape).astype(dtype)


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def contents(path: Path) -> dict[str, tuple]:
    """name -> (code, shape, bytes), as the safetensors library sees the file."""
    return {
        name: (item["dtype"], tuple(item["shape"]), bytes(item["data"]))
        for name, item in safetensors.deserialize(path.read_bytes())
    }


def write_all(path: Path, arrays: dict, **options) -> None:
    write_safetensors(path, arrays, arrays.__getitem__, **options)


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """Every dtype, with sizes that leave later tensors unaligned; a scalar and empty ones."""
    result = {f"layers.{code}.weight": random_array(DTYPES[code], (3, 5)) for code in reversed(DTYPES)}
    result["scalar"] = np.array(2.5, np.float32)
    result["empty"] = np.zeros((0, 4), ml_dtypes.bfloat16)
    result["empty.inner"] = np.zeros((3, 0, 2), np.int64)
    return result


# Reading and writing whole files


def test_written_file_equals_the_library_view_for_every_dtype(tmp_path, arrays):
    path = tmp_path / "all.safetensors"
    write_all(path, arrays, metadata={"format": "pt", "note": "größe 1"})
    codes = {dtype: code for code, dtype in DTYPES.items()}
    assert contents(path) == {name: (codes[a.dtype], a.shape, bits(a)) for name, a in arrays.items()}
    with safetensors.safe_open(path, framework="np") as reference:
        assert reference.metadata() == {"format": "pt", "note": "größe 1"}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    with SafetensorsFile(path) as file:
        assert list(file.tensors) == list(arrays)
        assert file.metadata == {"format": "pt", "note": "größe 1"}
        for name, array in arrays.items():
            read = file.read(name)
            assert isinstance(read, np.ndarray)
            assert (read.dtype, read.shape, bits(read)) == (array.dtype, array.shape, bits(array))
            assert file.tensors[name].nbytes == array.nbytes


def test_reads_what_the_library_writes(tmp_path):
    names = [code for code in DTYPES if not code.startswith(("BF16", "F8"))]  # its numpy side lacks these
    originals = {code: random_array(DTYPES[code], (4, 3)) for code in names}
    safetensors.numpy.save_file(originals, tmp_path / "x.safetensors", metadata={"a": "b"})
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        assert file.metadata == {"a": "b"}
        for name, array in originals.items():
            np.testing.assert_array_equal(file.read(name), array, strict=True)


@pytest.mark.parity
def test_torch_reads_and_writes_the_same_bits(tmp_path, arrays):
    import safetensors.torch
    import torch

    write_all(tmp_path / "ours.safetensors", arrays)
    theirs = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    assert theirs.keys() == arrays.keys()
    for name, array in arrays.items():
        assert tuple(theirs[name].shape) == array.shape
        assert bytes(theirs[name].contiguous().reshape(-1).view(torch.uint8).numpy()) == bits(array)
    assert theirs["layers.F8_E4M3.weight"].dtype == torch.float8_e4m3fn
    assert theirs["layers.F8_E5M2.weight"].dtype == torch.float8_e5m2
    np.testing.assert_array_equal(
        theirs["layers.BF16.weight"].float().numpy(), arrays["layers.BF16.weight"].astype(np.float32)
    )
    safetensors.torch.save_file(theirs, tmp_path / "theirs.safetensors")
    with SafetensorsFile(tmp_path / "theirs.safetensors") as file:
        for name, array in arrays.items():
            assert (file.info(name).dtype, bits(file.read(name))) == (array.dtype, bits(array))


# Slices, views, memory


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_slices_equal_numpy_slicing(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=4)))
    dtype = DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))]
    array = random_array(dtype, shape)
    bounds = st.none() | st.integers(-8, 8)
    steps = st.none() | st.sampled_from([1, 2, -1, -3])
    count = data.draw(st.integers(0, len(shape)))
    index = tuple(slice(data.draw(bounds), data.draw(bounds), data.draw(steps)) for _ in range(count))
    path = tmp_path_factory.getbasetemp() / "slices.safetensors"
    write_all(path, {"pad": np.zeros(3, np.uint8), "x": array})
    with SafetensorsFile(path) as file:
        part = file.read("x", index)
        assert isinstance(part, np.ndarray)
        assert not part.flags.owndata
        assert (part.dtype, part.shape, bits(part)) == (dtype, array[(*index, ...)].shape, bits(array[index]))


def test_views_are_read_only_and_outlive_the_file(tmp_path):
    values = random_array(np.dtype(np.float32), (1000,))
    write_all(tmp_path / "x.safetensors", {"x": values})
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        view, part = file.read("x"), file.read("x", (slice(10, 20),))
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
        file.release("x")
        np.testing.assert_array_equal(view, values)
    os.unlink(tmp_path / "x.safetensors")
    del file
    np.testing.assert_array_equal(view, values)
    del view
    np.testing.assert_array_equal(part, values[10:20])


def test_reading_after_close_is_an_error(tmp_path):
    write_all(tmp_path / "x.safetensors", {"x": np.ones(3)})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    file.close()
    for use in (file.read, file.release):
        with pytest.raises(SafetensorsError, match="after close"):
            use("x")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to see resident memory")
def test_a_slice_costs_its_pages_and_release_returns_them(tmp_path):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    rows, columns, mib = 1 << 18, 1 << 10, 1 << 20  # 1 GiB, all holes
    path = tmp_path / "sparse.safetensors"
    path.write_bytes(build({"x": entry("F32", [rows, columns], 0, rows * columns * 4)}))
    os.truncate(path, path.stat().st_size + rows * columns * 4)
    before = resident()
    with SafetensorsFile(path) as file:
        assert file.read("x", (slice(rows // 2, rows // 2 + 1024),)).sum() == 0
        assert resident() - before < 32 * mib
        assert file.read("x", (slice(0, 32 * 1024),)).sum() == 0
        assert resident() - before > 100 * mib
        file.release("x")
        assert resident() - before < 32 * mib


# Files that are something else, or damaged


@pytest.mark.parametrize("content, told", [
    (b"", "empty file"),
    (bytes(4096), "begins with zeros"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "git-lfs.*git lfs pull"),
    (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "HTML page"),
    (b"<html><head>", "HTML page"),
    (b'{"error": "Repository not found"}', "JSON text"),
    (b"PK\x03\x04\x00\x00\x08\x08archive/data.pkl", r"pickle(.|\n)*torch\.load\('?"),
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "pickle"),
    (b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00}.", "pickle"),
    (b"GGUF\x03\x00\x00\x00\x22\x01\x00\x00", "GGUF"),
    (b"\x00\x01garbage of no known kind", "not a safetensors file"),
    (b"\x02\x00\x00", "not a safetensors file"),
    ((100_000_001).to_bytes(8, "little") + b"{" + bytes(100), "not a safetensors file"),
    ((5000).to_bytes(8, "little") + b'{"x":', "truncated: the header promises 5008 bytes, the file has 13"),
])  # fmt: skip
def test_foreign_files_are_called_by_their_name(tmp_path, content, told):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(SafetensorsError, match=re.escape(str(path)) + f": .*{told}"):
        SafetensorsFile(path)


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    write_all(path, {"x": np.arange(20.0), "y": np.ones((2, 3), np.int8)})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(SafetensorsError, match=r"truncated|empty|not a safetensors"):
            SafetensorsFile(path)


X4 = entry("F32", [1], 0, 4)


@pytest.mark.parametrize("header, size, told", [
    (b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
     b'"x":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}', 1, "key 'x' appears twice"),
    (b'{"x":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', 1, "key 'dtype' appears twice"),
    (b'{"__metadata__":{"a":"1","a":"2"}}', 0, "key 'a' appears twice"),
    ({"x": X4, "y": entry("F32", [1], 2, 6)}, 6, "tensor 'y' overlaps"),
    ({"x": X4, "y": X4}, 4, "tensor 'y' overlaps"),
    ({"x": X4, "y": entry("F32", [1], 8, 12)}, 12, "tensor 'y' leaves a hole"),
    ({"x": entry("F32", [1], 4, 8)}, 8, "tensor 'x' leaves a hole"),
    ({"x": X4}, 3, "truncated"),
    ({"x": X4}, 5, "1 bytes lie after"),
    ({"x": entry("F32", [2], 0, 4)}, 4, r"F32 \[2\] takes 8 bytes, data_offsets hold 4"),
    ({"x": entry("F32", [1], 4, 0)}, 4, "takes 4 bytes, data_offsets hold -4"),
    ({"x": entry("F32", [-1, -1], 0, 4)}, 4, "-1 is not a size"),
    ({"x": entry("F32", [True], 0, 4)}, 4, r"shape \[True\]"),
    ({"x": entry("F32", [1.0], 0, 4)}, 4, r"shape \[1.0\]"),
    ({"x": entry("F32", [1], False, 4)}, 4, "data_offsets"),
    ({"x": entry("F32", [1], 0, 4, 4)}, 4, "data_offsets"),
    ({"x": entry("F32", [2**63, 2], 0, 0)}, 0, "not a size"),
    ({"x": entry("F32", [2**62, 4], 0, 0)}, 0, "too large"),
    ({"x": entry("F32", [2**40, 2**40, 0], 0, 0)}, 0, "too large"),
    ({"x": entry("F32", [1] * 65, 0, 4)}, 4, "64 sizes"),
    (b'{"x":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', 0, "-0 is not a size"),
    (b'{"x":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}', 0, "not a size"),
    ({"x": entry("F4", [2], 0, 1)}, 1, "dtype 'F4' is not one of F64, .*F8_E4M3"),
    ({"x": entry("F8_E8M0", [1], 0, 1)}, 1, "dtype 'F8_E8M0'"),
    ({"x": entry(["F32"], [1], 0, 4)}, 4, "dtype"),
    ({"x": {"dtype": "F32", "shape": [1]}}, 0, "must have dtype, shape and data_offsets"),
    ({"x": {**X4, "extra": 1}}, 4, "and nothing else"),
    ({"x": [1]}, 0, "must have dtype"),
    *(({name: X4}, 4, "not an acceptable name")
      for name in ("../x", "a/../x", "/etc/x", "~/x", "a\\b", "a\0b", "a\nb", "")),
    ({"__metadata__": {"a": 1}}, 0, "strings to strings"),
    ({"__metadata__": None}, 0, "strings to strings"),
    (b'{"\\ud800": 1}', 0, "not valid JSON"),
    (b'{"__metadata__":{"a":"\\ud800"}}', 0, "not valid JSON"),
    (b'{"\xff": 1}', 0, "not valid JSON"),
    (b'{"x": ' + b"[" * 100_000, 0, "not valid JSON"),
    (b"{} {}", 0, "not valid JSON"),
])  # fmt: skip
def test_hostile_headers(tmp_path, header, size, told):
    path = tmp_path / "x.safetensors"
    path.write_bytes(build(header, b"\1" * size))
    with pytest.raises(SafetensorsError, match=re.escape(str(path)) + f": .*{told}"):
        SafetensorsFile(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=4) | st.just("F32"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "C64"]) | JSON,
        "shape": st.lists(st.integers(0, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | JSON,
    }
)


@st.composite
def valid(draw) -> bytes:
    names = draw(st.lists(st.text(min_size=1, max_size=4), max_size=4, unique=True))
    header, size = {}, 0
    for name in names:
        code, shape = draw(st.sampled_from(sorted(DTYPES))), draw(st.lists(st.integers(0, 3), max_size=3))
        end = size + int(np.prod(shape)) * DTYPES[code].itemsize
        header[name] = entry(code, shape, size, end)
        size = end
    header = {name: header[name] for name in draw(st.permutations(names))}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2))
    text = json.dumps(header, ensure_ascii=draw(st.booleans())) + " " * draw(st.integers(0, 8))
    return build(text.encode(), RNG.bytes(size))


@st.composite
def mutated(draw) -> bytes:
    content = bytearray(draw(valid()))
    length = len(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content) - 1))
        replacement = st.binary(max_size=3) | st.sampled_from([b'"', b"}", b"[", b"9", b"0", b",", b"-", b"\\"])
        content[at : at + draw(st.integers(0, 3))] = draw(replacement)
        if not content:
            return b""
    if draw(st.booleans()):  # keep the length honest, so that the change reaches the JSON
        grown = int.from_bytes(content[:8], "little") + len(content) - length
        content[:8] = (grown % 2**64).to_bytes(8, "little")
    return bytes(content)


@settings(max_examples=800, deadline=None)
@given(
    content=st.binary(max_size=64)
    | valid()
    | mutated()
    | st.builds(build, st.dictionaries(st.text(max_size=3), ENTRY | JSON, max_size=3), st.binary(max_size=48))
    | st.builds(build, JSON, st.binary(max_size=8))
    | st.builds(build, st.binary(max_size=64).map(lambda tail: b"{" + tail))
)
def test_fuzzed_files_parse_as_in_the_library_or_raise_our_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except SafetensorsError:
        return
    codes = {dtype: code for code, dtype in DTYPES.items()}
    assert contents(path) == {
        name: (codes[info.dtype], info.shape, bits(file.read(name))) for name, info in file.tensors.items()
    }
