import math
import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.quantization import nested

encode, decode = jax.jit(nested.encode), jax.jit(nested.decode)
X86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="torch rounds by instruction set")


def absmax_like(shape, seed=0):
    """Positive values distributed as the absmax of blocks of 64 normal weights."""
    draws = np.random.default_rng(seed).standard_normal((*shape, 64)).astype(np.float32)
    return np.abs(draws).max(-1) * np.float32(0.02)


def ulps(a, b):
    return abs(int(np.float32(a).view(np.int32)) - int(np.float32(b).view(np.int32)))


def test_dynamic_map_has_the_structure_of_the_type():
    values = nested.dynamic_map()
    assert values.dtype == np.float32
    assert values.shape == (256,)
    assert np.all(np.diff(values) > 0)
    np.testing.assert_array_equal(values[:127], -values[254:127:-1])
    assert (values[127], values[255]) == (0, 1)
    for decade in range(7):
        inside = (values > 10.0 ** (decade - 7)) & (values < 10.0 ** (decade - 6))
        assert inside.sum() == 2**decade


@X86
@pytest.mark.parity
def test_dynamic_map_equals_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    np.testing.assert_array_equal(nested.dynamic_map(), functional.create_dynamic_map().numpy())


SIZES = [1, 7, 8, 100, 511, 1296, 8193, 32767, 131073]


@X86
@pytest.mark.parity
@pytest.mark.parametrize("size", SIZES)
def test_mean_has_the_bits_of_torch_on_one_thread(one_torch_thread, size):
    torch = pytest.importorskip("torch")
    x = absmax_like((2, size))
    expected = np.array([torch.from_numpy(row).mean() for row in x])
    np.testing.assert_array_equal(jax.jit(nested._mean)(x), expected)
    if size == 1296:
        np.testing.assert_array_equal(jax.jit(jax.vmap(nested._mean))(x), expected)


@pytest.mark.parity
def test_mean_is_within_two_ulps_of_the_exact_one_and_of_a_threaded_sum():
    torch = pytest.importorskip("torch")
    for seed, size in enumerate([64, 5184, 262144]):
        x = absmax_like((size,), seed)
        mean = jax.jit(nested._mean)(x)
        assert ulps(mean, math.fsum(x.tolist()) / size) <= 2
        assert ulps(mean, torch.from_numpy(x).mean().item()) <= 2


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(64, 4), (100, 5), (3, 1)])
def test_codes_and_absmax_equal_bitsandbytes_bit_for_bit(bnb_kernels, shape):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    absmax = absmax_like(shape)
    codes, scales, offset = encode(jnp.asarray(absmax))
    flat = absmax.reshape(-1) - np.asarray(offset)
    # The pure torch kernel divides in a short last block where the CUDA kernel always multiplies with the
    # reciprocal; filled up with zeros every block is whole, and the two agree.
    whole = torch.from_numpy(np.pad(flat, (0, -flat.size % 256)))
    expected, expected_scales = bnb_kernels["quantize_blockwise"](whole, functional.create_dynamic_map(), 256)
    np.testing.assert_array_equal(codes.reshape(-1), expected.numpy()[: flat.size])
    np.testing.assert_array_equal(scales, expected_scales.numpy())
    decoded = functional.dequantize_blockwise(
        expected[: flat.size], absmax=expected_scales, code=functional.create_dynamic_map(), blocksize=256
    )
    decoded += torch.tensor(np.asarray(offset))
    np.testing.assert_array_equal(decode(codes, scales, offset).reshape(-1), decoded.numpy())


def test_stack_gives_the_stack_of_matrices():
    absmax = jnp.asarray(absmax_like((2, 2, 40, 9)))
    codes, scales, offset = encode(absmax)
    assert (codes.shape, scales.shape, offset.shape) == ((2, 2, 40, 9), (2, 2, 2), (2, 2))
    for i, j in np.ndindex(2, 2):
        for whole, one in zip((codes, scales, offset), encode(absmax[i, j]), strict=True):
            np.testing.assert_array_equal(whole[i, j], one)


def test_nearest_value_is_chosen_and_error_is_small():
    absmax = absmax_like((64, 64))
    codes, scales, offset = encode(absmax)
    centred = absmax.reshape(-1, 256).astype(np.float64) - float(offset)
    fractions = centred / np.asarray(scales, np.float64)[:, None]
    distance = np.abs(fractions[..., None] - nested.dynamic_map().astype(np.float64))
    chosen = np.take_along_axis(distance, np.asarray(codes, np.int64).reshape(-1, 256, 1), -1)[..., 0]
    assert np.all(chosen <= distance.min(-1) + 1e-7)
    error = np.asarray(decode(codes, scales, offset)) - absmax
    assert np.sqrt(np.mean(error**2)) < 0.01 * absmax.mean()


def test_equal_values_come_back_exactly():
    absmax = jnp.full((8, 3), 0.37)
    codes, scales, offset = encode(absmax)
    assert float(scales[0]) <= 1e-7
    np.testing.assert_allclose(decode(codes, scales, offset), absmax, rtol=2e-7)
