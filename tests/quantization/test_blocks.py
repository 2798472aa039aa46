import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.quantization import blocks


@pytest.mark.parametrize("width, size", [(128, 64), (100, 64), (7, 3), (5, 8), (6, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extremes_and_absmax_of_every_block(width, size, dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, width)), dtype)
    low, high = blocks.extremes(x, size)
    peak = blocks.absmax(x, size)
    assert low.dtype == high.dtype == peak.dtype == jnp.float32
    values = np.asarray(x, np.float32)
    for i, start in enumerate(range(0, width, size)):
        block = values[..., start : start + size]
        np.testing.assert_array_equal(peak[..., i], np.abs(block).max(-1))
        if block.shape[-1] == size:
            np.testing.assert_array_equal(low[..., i], block.min(-1))
            np.testing.assert_array_equal(high[..., i], block.max(-1))
    assert peak.shape == (2, 3, -(-width // size))


def test_short_block_is_filled_with_zeros():
    low, high = blocks.extremes(jnp.array([[5.0, 6.0, 7.0]]), 2)
    assert low.tolist() == [[5.0, 0.0]]
    assert high.tolist() == [[6.0, 7.0]]


def test_spread_gives_each_element_the_value_of_its_block():
    spread = blocks.spread(jnp.array([[1.0, 2.0, 3.0]]), 4, 10)
    assert spread.tolist() == [[1.0] * 4 + [2.0] * 4 + [3.0] * 2]


def test_reciprocal_of_nothing_is_finite():
    values = blocks.reciprocal(jnp.array([0.0, 0.25]))
    assert np.isfinite(values[0])
    assert values[1] == 4.0
