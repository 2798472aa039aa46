"""Reader and writer against the safetensors library, torch and transformers, and against hostile files."""

import json
import os
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxft.hub.safetensors import (
    DTYPES,
    Checkpoint,
    SafetensorsError,
    SafetensorsFile,
    write_checkpoint,
    write_safetensors,
)

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


@pytest.mark.parametrize("model", ["stories260K", "stories15M"])
def test_real_models(material, model):
    directory = material / "models" / model
    reference = safetensors.numpy.load_file(directory / "model.safetensors")
    with Checkpoint.open(directory) as checkpoint:
        assert sorted(checkpoint.names()) == sorted(reference)
        for name, array in reference.items():
            assert checkpoint.info(name).shape == array.shape
            np.testing.assert_array_equal(checkpoint.read(name), array, strict=True)
            checkpoint.release(name)


@pytest.mark.parametrize("make", [
    pytest.param(lambda a: a.T, id="transposed"),
    pytest.param(lambda a: a[::-2, 1::3], id="strided"),
    pytest.param(lambda a: np.asfortranarray(a), id="fortran"),
    pytest.param(lambda a: a.astype(">f4"), id="big-endian"),
    pytest.param(lambda a: np.broadcast_to(a[:1], (6, 9)), id="broadcast"),
    pytest.param(lambda a: jnp.asarray(a, jnp.bfloat16), id="jax"),
])  # fmt: skip
def test_writes_logical_order_whatever_the_memory(tmp_path, make):
    array = make(random_array(np.dtype(np.float32), (6, 9)))
    write_all(tmp_path / "x.safetensors", {"a": array, "b": np.arange(3)})
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        np.testing.assert_array_equal(file.read("a"), np.asarray(array))
        assert file.read("a").dtype == np.asarray(array).dtype.newbyteorder("=")
        np.testing.assert_array_equal(file.read("b"), [0, 1, 2])


def test_pieces_of_a_large_strided_array_join(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxft.hub.safetensors._PIECE", 100)
    array = random_array(np.dtype(np.int16), (7, 5, 11)).transpose(2, 0, 1)
    wide = random_array(np.dtype(np.float64), (2, 50))
    write_all(tmp_path / "x.safetensors", {"a": array, "wide": wide})
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        np.testing.assert_array_equal(file.read("a"), array)
        np.testing.assert_array_equal(file.read("wide"), wide)


def test_writer_holds_one_tensor_at_a_time(tmp_path):
    made = []
    specs = {f"t{i}": jax.ShapeDtypeStruct((10 + i,), jnp.float32) for i in range(5)}

    class Tracked(np.ndarray):
        pass

    def produce(name: str) -> np.ndarray:
        assert all(tensor() is None for tensor in made), "a tensor before this one is still held"
        array = np.full(specs[name].shape, int(name[1:]), np.float32).view(Tracked)
        made.append(weakref.ref(array))
        return array

    write_checkpoint(tmp_path, specs, produce, max_shard_bytes=100)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert [checkpoint.read(f"t{i}").sum() for i in range(5)] == [i * (10 + i) for i in range(5)]


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
    write_all(tmp_path / "model.safetensors", {"x": np.ones(3)})
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.close()
    for use in (checkpoint.read, checkpoint.release):
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


# Checkpoints


@pytest.fixture
def sharded(tmp_path) -> tuple[Path, dict[str, np.ndarray]]:
    arrays = {f"model.layers.{i}.weight": random_array(np.dtype(np.float32), (4, i + 1)) for i in range(6)}
    arrays["lm_head.weight"] = random_array(np.dtype(ml_dtypes.bfloat16), (100, 3))
    directory = tmp_path / "model"
    directory.mkdir()
    write_checkpoint(directory, arrays, arrays.__getitem__, max_shard_bytes=200)
    return directory, arrays


def edit_index(directory: Path, edit) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def test_sharded_checkpoint(sharded):
    directory, arrays = sharded
    # 16 + 32 + 48 + 64 | 80 + 96 | 600 bytes, the last over the limit by itself
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(os.listdir(directory)) == [*shards, "model.safetensors.index.json"]
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(a.nbytes for a in arrays.values())}
    assert [len(contents(directory / shard)) for shard in shards] == [4, 2, 1]
    assert index["weight_map"] == {name: shard for shard in shards for name in contents(directory / shard)}
    with Checkpoint.open(directory) as checkpoint:
        assert checkpoint.names() == tuple(arrays)
        assert checkpoint.metadata == {"format": "pt"}
        for name, array in arrays.items():
            np.testing.assert_array_equal(checkpoint.read(name), array, strict=True)
            np.testing.assert_array_equal(checkpoint.read(name, (slice(1, 3),)), array[1:3], strict=True)
        with pytest.raises(SafetensorsError, match=r"no tensor 'layer.3.weight'.*model.layers.3.weight"):
            checkpoint.read("layer.3.weight")


def test_one_shard_needs_no_index(tmp_path):
    arrays = {"a": np.ones(3), "b": np.zeros((2, 2), np.int8)}
    written = write_checkpoint(tmp_path, arrays, arrays.__getitem__, stem="adapter_model", max_shard_bytes=28)
    assert written == [tmp_path / "adapter_model.safetensors"]
    assert os.listdir(tmp_path) == ["adapter_model.safetensors"]
    assert Checkpoint.open(tmp_path, stem="adapter_model").names() == ("a", "b")


def test_a_tensor_over_the_limit_is_its_own_shard(tmp_path):
    arrays = {name: np.ones(size) for name, size in (("big", 9), ("a", 1), ("b", 1), ("huge", 20), ("c", 1))}
    write_checkpoint(tmp_path, arrays, arrays.__getitem__, max_shard_bytes=16)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [list(SafetensorsFile(shard).tensors) for shard in shards] == [
        ["big"],
        ["a", "b"],
        ["huge"],
        ["c"],
    ]


@pytest.mark.parity
def test_transformers_loads_the_shards(tmp_path, material):
    import torch
    from transformers import AutoModelForCausalLM

    source = material / "models" / "stories260K"
    with Checkpoint.open(source) as checkpoint:
        specs = {name: checkpoint.info(name) for name in checkpoint.names()}
        written = write_checkpoint(tmp_path, specs, checkpoint.read, max_shard_bytes=200_000)
    assert len(written) > 3
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    ours, reference = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path, source))
    assert ours.keys() == reference.keys()
    assert all(torch.equal(ours[name], reference[name]) for name in reference)


@pytest.mark.parametrize("shard", [
    "../secret.safetensors", "/etc/hostname", "/etc/x.safetensors", "sub/x.safetensors", "..", "", 5, None,
    "pytorch_model-00001-of-00002.bin", "a\\b.safetensors", ".safetensors",
])  # fmt: skip
def test_index_may_name_only_files_beside_it(sharded, shard):
    directory, _ = sharded
    (directory.parent / "secret.safetensors").write_bytes(build({"lm_head.weight": X4}, bytes(4)))
    edit_index(directory, lambda index: index["weight_map"].update({"lm_head.weight": shard}))
    with pytest.raises(SafetensorsError, match=r"index\.json: 'lm_head.weight': .* bare name"):
        Checkpoint.open(directory)


def test_index_must_equal_its_shards(sharded):
    directory, _ = sharded
    index = (directory / "model.safetensors.index.json").read_bytes()
    edit_index(directory, lambda index: index["weight_map"].pop("model.layers.4.weight"))
    with pytest.raises(SafetensorsError, match=r"00002-of-00003.* only the shard has model.layers.4.we"):
        Checkpoint.open(directory)
    extra = {f"ghost.{i}": "model-00001-of-00003.safetensors" for i in range(8)}
    edit_index(directory, lambda index: index["weight_map"].update(extra))
    with pytest.raises(SafetensorsError, match=r"00001-of-00003.* only the index has ghost.0, .*and 3 more"):
        Checkpoint.open(directory)
    (directory / "model.safetensors.index.json").write_bytes(index)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(SafetensorsError, match=r"model-00002-of-00003.safetensors: no such file"):
        Checkpoint.open(directory)


@pytest.mark.parametrize("text, told", [
    ("{}", "no weight_map"),
    ('{"weight_map": {}}', "no weight_map"),
    ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' appears twice"),
    ("[]", "not a JSON object"),
    ("", "not valid JSON"),
])  # fmt: skip
def test_damaged_index(tmp_path, text, told):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(SafetensorsError, match=rf"model\.safetensors\.index\.json: .*{told}"):
        Checkpoint.open(tmp_path)


def test_index_beside_a_single_file(sharded):
    directory, _ = sharded
    (directory / "model-00001-of-00003.safetensors").rename(directory / "model.safetensors")
    with pytest.raises(SafetensorsError, match="two sets of weights"):
        Checkpoint.open(directory)
    names = contents(directory / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(Checkpoint.open(directory).names()) == set(names)


def test_directories_without_weights(tmp_path):
    with pytest.raises(SafetensorsError, match="nowhere: no such directory"):
        Checkpoint.open(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SafetensorsError, match=r"neither model.safetensors nor .*, but config.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(build({}))
    with pytest.raises(SafetensorsError, match=r"shards model-00001-of-00002.safetensors without .*index"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(SafetensorsError, match=r"model.safetensors: no such file"):
        Checkpoint.open(tmp_path)


@pytest.mark.parity
def test_pickles_are_refused_with_a_conversion_that_works(tmp_path, monkeypatch):
    import torch

    weights = {f"layer.{i}": torch.randn(3, 4).to(torch.bfloat16) for i in range(4)}
    for part, names in (("00001", ["layer.0", "layer.1"]), ("00002", ["layer.2", "layer.3"])):
        torch.save({name: weights[name] for name in names}, tmp_path / f"pytorch_model-{part}-of-00002.bin")
    torch.save({"lr": 1.0}, tmp_path / "training_args.bin")
    with pytest.raises(SafetensorsError, match="only as pickles") as caught:
        Checkpoint.open(tmp_path)
    recipe = "\n".join(line[4:] for line in str(caught.value).splitlines() if line.startswith("    "))
    assert "training_args" not in recipe
    assert "weights_only=True" in recipe
    monkeypatch.chdir(tmp_path)
    exec(recipe, {})
    with Checkpoint.open(tmp_path) as checkpoint:
        for name, tensor in weights.items():
            np.testing.assert_array_equal(checkpoint.read(name).astype(np.float32), tensor.float().numpy())


# Writing that fails


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("fault, told", [
    (RuntimeError("device lost"), "device lost"),
    (KeyboardInterrupt("stop"), "stop"),
    (np.zeros((2, 3), np.float32), r"'b': announced as float32 \(3, 2\), produced as float32 \(2, 3\)"),
    (np.zeros((3, 2), np.float64), r"'b': announced as float32 .* produced as float64"),
])  # fmt: skip
@pytest.mark.parametrize("existing", [{}, {"x.safetensors": b"old"}])
def test_a_failed_write_leaves_what_was_there(tmp_path, fault, told, existing):
    for name, content in existing.items():
        (tmp_path / name).write_bytes(content)
    specs = {name: jax.ShapeDtypeStruct((3, 2), jnp.float32) for name in "abc"}

    def produce(name: str) -> np.ndarray:
        if name != "b":
            return np.ones((3, 2), np.float32)
        if isinstance(fault, BaseException):
            raise fault
        return fault

    expected = SafetensorsError if isinstance(fault, np.ndarray) else type(fault)
    with pytest.raises(expected, match=told):
        write_safetensors(tmp_path / "x.safetensors", specs, produce)
    assert snapshot(tmp_path) == existing
    with pytest.raises(expected, match=told):
        write_checkpoint(tmp_path, specs, produce, max_shard_bytes=24)
    assert snapshot(tmp_path) == existing


@pytest.mark.parametrize("specs, options, told", [
    ({"a": np.zeros(2, np.complex64)}, {}, "tensor 'a': the format has no dtype complex64"),
    ({"a": np.zeros(2, ml_dtypes.int4)}, {}, "no dtype int4"),
    ({"../a": np.zeros(2)}, {}, "tensor '../a': not an acceptable name"),
    ({"a\ud800": np.zeros(2)}, {}, "cannot be written"),
    ({"__metadata__": np.zeros(2)}, {}, "cannot be written"),
    ({"a": np.zeros(2)}, {"metadata": {"rank": 8}}, "strings to strings"),
    ({"a": jax.ShapeDtypeStruct((1 << 50,), jnp.uint8)}, {}, "the disk has"),
])  # fmt: skip
def test_what_cannot_be_written_is_told_before_anything_is(tmp_path, specs, options, told):
    def produce(name: str) -> np.ndarray:
        raise AssertionError("asked for a tensor")

    for write in (lambda: write_safetensors(tmp_path / "x.safetensors", specs, produce, **options),
                  lambda: write_checkpoint(tmp_path, specs, produce, **options)):  # fmt: skip
        with pytest.raises(SafetensorsError, match=told):
            write()
    assert snapshot(tmp_path) == {}


def test_disk_must_hold_all_shards_together(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda directory: SimpleNamespace(free=500))
    arrays = {"a": np.ones(25), "b": np.ones(25), "c": np.ones(25)}
    with pytest.raises(SafetensorsError, match="600 bytes are to be written, the disk has 500 free"):
        write_checkpoint(tmp_path, arrays, arrays.__getitem__, max_shard_bytes=200)
    assert snapshot(tmp_path) == {}


def test_a_checkpoint_is_not_written_over_another(sharded):
    directory, arrays = sharded
    before = snapshot(directory)
    with pytest.raises(SafetensorsError, match=r"already holds model-00001-of-00003.safetensors"):
        write_checkpoint(directory, arrays, arrays.__getitem__)
    assert snapshot(directory) == before
    with pytest.raises(SafetensorsError, match="no tensors"):
        write_checkpoint(directory, {}, arrays.__getitem__, stem="other")


def test_file_permissions_follow_the_umask(tmp_path):
    write_checkpoint(tmp_path, {"a": np.ones(2)}, lambda name: np.ones(2))
    (tmp_path / "plain").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
