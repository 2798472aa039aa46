"""Digests depend on every bit and its place, and on nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.sharding.mesh import make_mesh
from jaxft.training.digest import _LANES, digests

RANDOM = np.random.default_rng(0)
MASK = 0xFFFFFFFF


def sums(array) -> str:
    return digests({"x": jnp.asarray(array)})["x"].sums


def mixed(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ x >> 16


def reference(words: list[int]) -> str:
    """In Python's integers, element by element."""
    totals = [
        sum(mixed((word * odd + place * other) & MASK) for place, word in enumerate(words)) & MASK
        for odd, other in _LANES
    ]
    return "".join(f"{total:08x}" for total in totals)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4)])
def test_it_is_the_sum_of_what_elements_give(dtype, shape):
    array = jnp.asarray(RANDOM.normal(0, 50, shape), jnp.float32).astype(dtype)
    host = np.asarray(array)
    words = host.reshape(-1).view(f"u{host.itemsize}").tolist()
    assert sums(array) == reference(words)


@pytest.mark.parametrize("spec", [P(), P("fsdp"), P(None, "tensor"), P("tensor", "fsdp"), P(("fsdp", "tensor"), None)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_does_not_depend_on_how_the_array_is_cut(spec, dtype):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    array = jnp.asarray(RANDOM.normal(size=(3, 16, 24)), dtype)
    cut = jax.device_put(array, NamedSharding(mesh, P(None, *spec)))
    assert digests({"x": cut}) == digests({"x": array})


def test_devices_do_not_send_their_parts():
    from jaxft.training.digest import _sums

    array = jax.device_put(jnp.zeros((64, 128)), NamedSharding(make_mesh({"fsdp": 8}), P("fsdp")))
    program = _sums.lower(array).compile().as_text()
    assert "f32[64,128]" not in program, "no device sees the whole array"
    assert "all-gather" in program or "all-reduce" in program


def test_any_bit_and_any_place_counts():
    array = RANDOM.normal(size=(16, 8)).astype(np.float32)
    seen = {sums(array)}
    for bit in range(32):
        changed = array.copy()
        changed.view(np.uint32)[3, bit % 8] ^= np.uint32(1 << bit)
        seen.add(sums(changed))
    others = [array[::-1], array.T.copy(), array.reshape(8, 16)[:, ::-1], -array, np.roll(array, 1), array[:, :7]]
    twice = array.copy()
    twice.view(np.uint32)[[0, 1], 0] ^= np.uint32(1 << 31)  # two signs
    for other in (*others, twice, array * np.float32(2)):
        seen.add(sums(other))
    assert len(seen) == 1 + 32 + len(others) + 2


def test_zeros_are_not_all_alike():
    assert len({sums(np.zeros(size, np.float32)) for size in range(1, 9)}) == 8
    assert sums(np.float32([0.0, -0.0])) != sums(np.float32([-0.0, 0.0])) != sums(np.float32([0.0, 0.0]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_that_are_not_finite_are_seen(bad, dtype):
    array = np.ones((4, 5))
    assert digests({"x": jnp.asarray(array, dtype)})["x"].finite
    array[2, 3] = bad
    found = digests({"x": jnp.asarray(array, dtype), "y": jnp.ones(3), "z": jnp.int32(7)})
    assert [digest.finite for digest in found.values()] == [False, True, True]
