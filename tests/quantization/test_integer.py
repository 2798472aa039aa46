import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.quantization.integer import Int4, Int8
from jaxft.quantization.qtensor import QTensor, quantize

run = jax.jit(quantize, static_argnames="format")
dequantize = jax.jit(QTensor.dequantize, static_argnames="dtype")


def weights(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * 0.02, dtype)


def rmse(w, q):
    return float(jnp.sqrt(jnp.mean((dequantize(q, jnp.float32) - w.astype(jnp.float32)) ** 2)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_int8_codes_scales_and_values(dtype):
    w = weights((3, 40, 72), dtype)
    q = run(w, format=Int8())
    assert (q.codes.dtype, q.codes.shape, q.scales.shape) == (jnp.int8, (3, 40, 72), (3, 40, 1))
    values = np.asarray(w, np.float32)
    absmax = np.abs(values).max(-1, keepdims=True)
    np.testing.assert_array_equal(q.scales, absmax)
    codes = np.rint(values * (1 / absmax * np.float32(127)))
    np.testing.assert_array_equal(q.codes, codes)
    np.testing.assert_array_equal(dequantize(q, jnp.float32), codes.astype(np.float32) * absmax * np.float32(1 / 127))


def test_int8_rounds_half_to_even_and_keeps_zero_rows():
    w = jnp.array([[127.0, 0.5, 1.5, -2.5, 3.5], [0.0] * 5])
    q = run(w, format=Int8())
    assert q.codes.tolist() == [[127, 0, 2, -2, 4], [0] * 5]
    assert dequantize(q, jnp.float32)[1].tolist() == [0.0] * 5


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_int8_equals_bitsandbytes_bit_for_bit(bnb_kernels, dtype):
    torch = pytest.importorskip("torch")
    w = torch.randn(96, 320, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    codes, absmax, _ = bnb_kernels["int8_vectorwise_quant"](w)
    q = run(jnp.asarray(w.float().numpy(), dtype), format=Int8())
    np.testing.assert_array_equal(q.codes, codes.numpy())
    np.testing.assert_array_equal(q.scales[:, 0], absmax.numpy())
    expected = torch.ops.bitsandbytes.int8_vectorwise_dequant(codes, absmax)
    np.testing.assert_array_equal(dequantize(q, jnp.float32), expected.numpy())


@pytest.mark.parametrize("group, width", [(64, 128), (48, 100), (7, 20), (256, 100)])
def test_int4_codes_scales_and_values(group, width):
    w = weights((2, 16, width), jnp.bfloat16)
    q = run(w, format=Int4(group))
    n = -(-width // group)
    assert (q.codes.dtype, q.codes.shape, q.scales.shape) == (jnp.int4, w.shape, (2, 16, n))
    values = np.pad(np.asarray(w, np.float32), [(0, 0), (0, 0), (0, n * group - width)])
    values = values.reshape(2, 16, n, group)
    extreme = np.take_along_axis(values, np.abs(values).argmax(-1)[..., None], -1)
    scale = extreme / np.float32(-8)
    np.testing.assert_array_equal(q.scales, scale[..., 0])
    codes = np.clip(np.rint(values * (1 / scale)), -8, 7)
    expected = (codes * scale).reshape(2, 16, -1)[..., :width]
    np.testing.assert_array_equal(q.codes.astype(jnp.int8), codes.reshape(2, 16, -1)[..., :width])
    np.testing.assert_array_equal(dequantize(q, jnp.float32), expected)
    np.testing.assert_array_equal(dequantize(q, jnp.bfloat16), jnp.asarray(expected, jnp.bfloat16))


def test_int4_keeps_the_extreme_of_each_group_and_uses_all_codes():
    w = weights((64, 256))
    q = run(w, Int4())
    groups, back = w.reshape(64, 4, 64), dequantize(q, jnp.float32).reshape(64, 4, 64)
    peak = jnp.abs(groups).argmax(-1, keepdims=True)
    np.testing.assert_array_equal(jnp.take_along_axis(groups, peak, -1), jnp.take_along_axis(back, peak, -1))
    assert set(np.unique(q.codes.astype(jnp.int8))) == set(range(-8, 8))
    assert bool(jnp.all(jnp.abs(groups - back) <= jnp.abs(q.scales)[..., None] * 1.0001))


@pytest.mark.parametrize("draw", ["standard_normal", "laplace"])
def test_int4_beats_codes_in_plus_minus_seven(draw):
    sample = getattr(np.random.default_rng(2), draw)(size=(256, 256)).astype(np.float32)
    groups = sample.reshape(256, 4, 64)
    step = np.abs(groups).max(-1, keepdims=True) / 7
    plain = np.sqrt(np.mean((np.rint(groups / step) * step - groups) ** 2))
    w = jnp.asarray(sample)
    assert rmse(w, run(w, Int4())) < 0.9 * plain


@pytest.mark.parametrize("format", [Int8(), Int4()])
def test_zero_groups_give_zeros(format):
    w = jnp.zeros((2, 128)).at[0, 3].set(-1.0)
    back = dequantize(run(w, format), jnp.float32)
    np.testing.assert_array_equal(back, w)


def test_error_falls_with_more_bits_and_smaller_groups():
    w = weights((128, 512))
    errors = [rmse(w, run(w, f)) for f in (Int8(), Int4(16), Int4(64), Int4(512))]
    assert errors == sorted(errors)
    assert errors[0] < 0.1 * errors[1]


def test_group_size_must_be_positive():
    with pytest.raises(ValueError, match="group_size must be a positive number of columns, got 0"):
        Int4(0)
