"""Blockwise attention against all scores at once, and its gradient against autodiff of that."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models.blockwise import Reach, Rule, attend


def plain(q, k, v, reach, window):
    """softmax(q kᵀ / √H) v with the whole matrix of scores at hand."""
    groups = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / q.shape[-1] ** 0.5
    distance = reach.offset + jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])[None, :]
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    seen = jnp.broadcast_to(seen, (q.shape[0], *seen.shape))
    if reach.query_segments is not None:
        seen &= reach.query_segments[:, :, None] == reach.key_segments[:, None, :]
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf)), v)


def draw(seed, batch, length, heads, kv_heads, head_dim, slots=None):
    """q, k, v and a cotangent, as large as makes the softmax far from flat."""
    shapes = [(batch, length, heads, head_dim)] + 2 * [(batch, slots or length, kv_heads, head_dim)]
    keys = jax.random.split(jax.random.key(seed), 4)
    return [2 * jax.random.normal(key, shape) for key, shape in zip(keys, [*shapes, shapes[0]], strict=True)]


def packed(batch, length):
    """Rows of several segments of different lengths, some starting and ending with padding (segment 0)."""
    random = np.random.default_rng(length)
    segments = np.sort(random.integers(0, 4, (batch, length)), axis=1)
    segments[0, length - length // 4 :] = 0
    return jnp.asarray(segments, jnp.int32)


@pytest.mark.parametrize(("segmented", "window"), [(False, None), (True, None), (False, 1), (True, 7), (False, 40)])
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "head_dim", "block"),
    [(37, 6, 2, 16, 16), (64, 4, 4, 8, 64), (65, 3, 1, 10, 16), (5, 2, 2, 24, 16), (1, 4, 2, 8, 16)],
)
def test_values_and_gradients(length, heads, kv_heads, head_dim, block, segmented, window):
    q, k, v, d_out = draw(length, 2, length, heads, kv_heads, head_dim)
    segments = packed(2, length) if segmented else None
    reach = Reach(jnp.int32(0), segments, segments)

    out, pull = jax.vjp(lambda *qkv: attend(*qkv, reach, Rule(window), block), q, k, v)
    expected, expected_pull = jax.vjp(lambda *qkv: plain(*qkv, reach, window), q, k, v)
    # Scores reach 50, and float32 rounds their exponentials by 50 times 6e-8.
    chex.assert_trees_all_close(out, expected, atol=5e-6, rtol=5e-6)
    chex.assert_trees_all_close(pull(d_out), expected_pull(d_out), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("offset", "length", "window"), [(0, 5, None), (20, 1, None), (20, 1, 6), (11, 30, 13), (40, 8, None)]
)
def test_queries_in_the_middle_of_a_cache(offset, length, window):
    """What stands in the cache past the last query, here NaN-free rubbish, is never seen."""
    q, k, v, _ = draw(offset, 2, length, 4, 2, 8, slots=48)
    written = jnp.where(jnp.arange(48) < offset + length, packed(2, 48), -1)
    reach = Reach(jnp.int32(offset), written[:, offset : offset + length], written)
    rubbish = jnp.where((jnp.arange(48) < offset + length)[None, :, None, None], 0.0, 1e4)
    fouled = k + rubbish, v + rubbish
    out = jax.jit(lambda offset: attend(q, *fouled, reach._replace(offset=offset), Rule(window), 16))(offset)
    chex.assert_trees_all_close(out, plain(q, k, v, reach, window), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (8, 2)])
@pytest.mark.parametrize(("length", "block"), [(1, 8), (2, 8), (9, 8), (64, 8), (64, 64)])
def test_bfloat16_runs_in_every_shape(length, heads, kv_heads, block):
    """Within bfloat16's rounding, 2^-8 relative, of the largest value, or of 2 where terms of that size cancel.

    Gradients pass through two roundings more.
    """
    q, k, v, d_out = (x.astype(jnp.bfloat16) for x in draw(length, 1, length, heads, kv_heads, 16))
    reach = Reach(jnp.int32(0), None, None)

    @jax.jit
    def both(q, k, v, d_out):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, reach, Rule(), block), q, k, v)
        return out, pull(d_out)

    wide = [x.astype(jnp.float32) for x in (q, k, v, d_out)]
    out, pull = jax.vjp(lambda *qkv: plain(*qkv, reach, None), *wide[:3])
    for found, expected, ulps in zip(
        *map(jax.tree.leaves, (both(q, k, v, d_out), (out, pull(wide[3])))), (2, 4, 4, 4), strict=True
    ):
        assert found.dtype == jnp.bfloat16
        error = jnp.abs(found.astype(jnp.float32) - expected).max()
        assert error <= ulps * 2**-8 * max(2.0, jnp.abs(expected).max())


def test_scores_of_whole_rows_are_never_held():
    """Not in the forward pass, not in the backward pass, not in between."""
    length, block = 1024, 128
    q, k, v, _ = draw(0, 1, length, 2, 1, 8)

    def loss(q, k, v):
        return attend(q, k, v, Reach(jnp.int32(0), None, None), Rule(), block).sum()

    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile().as_text()
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\w+\[(\d+(?:,\d+)*)\]", text)]
    assert max(sizes) < length * length / 4
    assert any(size >= 2 * block * block for size in sizes), "the scores of a block were not found: is this the test?"
