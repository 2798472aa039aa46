"""What the writer makes of arrays whatever their memory, and of writes that fail."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.hub.safetensors import SafetensorsError, SafetensorsFile
from jaxft.hub.safetensors_writer import write_safetensors

RNG = np.random.default_rng(7)


def write_all(path: Path, arrays: dict) -> None:
    write_safetensors(path, arrays, arrays.__getitem__)


@pytest.mark.parametrize("make", [
    pytest.param(lambda a: a.T, id="transposed"),
    pytest.param(lambda a: a[::-2, 1::3], id="strided"),
    pytest.param(lambda a: np.asfortranarray(a), id="fortran"),
    pytest.param(lambda a: a.astype(">f4"), id="big-endian"),
    pytest.param(lambda a: np.broadcast_to(a[:1], (6, 9)), id="broadcast"),
    pytest.param(lambda a: jnp.asarray(a, jnp.bfloat16), id="jax"),
])  # fmt: skip
def test_writes_logical_order_whatever_the_memory(tmp_path, make):
    array = make(RNG.standard_normal((6, 9), np.float32))
    write_all(tmp_path / "x.safetensors", {"a": array, "b": np.arange(3)})
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        np.testing.assert_array_equal(file.read("a"), np.asarray(array))
        assert file.read("a").dtype == np.asarray(array).dtype.newbyteorder("=")
        np.testing.assert_array_equal(file.read("b"), [0, 1, 2])


def test_pieces_of_a_large_strided_array_join(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxft.hub.safetensors_writer._PIECE", 100)
    array = RNG.integers(-999, 999, (7, 5, 11), np.int16).transpose(2, 0, 1)
    wide = RNG.standard_normal((2, 50))
    write_all(tmp_path / "x.safetensors", {"a": array, "wide": wide})
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        np.testing.assert_array_equal(file.read("a"), array)
        np.testing.assert_array_equal(file.read("wide"), wide)


@pytest.mark.parametrize("existing", [{}, {"x.safetensors": b"old"}])
def test_a_failed_write_leaves_what_was_there(tmp_path, snapshot, failing_write, existing):
    specs, produce, error, told = failing_write
    for name, content in existing.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=told):
        write_safetensors(tmp_path / "x.safetensors", specs, produce)
    assert snapshot(tmp_path) == existing


def test_what_cannot_be_written_is_told_before_anything_is(tmp_path, snapshot, impossible_write):
    specs, produce, options, told = impossible_write
    with pytest.raises((SafetensorsError, OSError), match=told):
        write_safetensors(tmp_path / "x.safetensors", specs, produce, **options)
    assert snapshot(tmp_path) == {}
