"""Attention with heads cut over devices is that of one device, gradients too, whatever divides and what does not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models import blockwise, splash
from jaxft.models.blockwise import Reach, Rule
from jaxft.models.ulysses import spread
from jaxft.sharding.mesh import batch_sharding, make_mesh

RULE = Rule(window=11)


def in_blocks(q, k, v, segments, sinks):
    return blockwise.attend(q, k, v, Reach(jnp.int32(0), segments, segments), RULE, block=16, sinks=sinks)


def by_splash(q, k, v, segments, sinks):
    return splash.attend(q, k, v, segments, RULE, sinks, interpret=True)


def draw(rows: int, length: int, heads: int, kv_heads: int):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, d_out = (
        jax.random.normal(key, (rows, length, n, 16))
        for key, n in zip(keys, (heads, kv_heads, kv_heads, heads), strict=False)
    )
    segments = np.sort(np.random.default_rng(0).integers(0, 4, (rows, length)), axis=1)
    return (q, k, v, jax.random.normal(keys[4], (heads,))), jnp.asarray(segments, jnp.int32), d_out


@pytest.mark.parametrize(
    ("mesh", "rows", "length", "heads", "kv_heads"),
    [
        (dict(context=8), 2, 32, 8, 2),
        (dict(context=2, fsdp=2, tensor=2), 4, 32, 8, 4),
        (dict(context=4, tensor=2), 1, 24, 16, 2),
        (dict(context=2, tensor=4), 2, 30, 16, 2),  # fewer key-value heads than tensor
        (dict(context=4, data=2), 3, 30, 4, 1),  # neither rows nor tokens divide
    ],
    ids=str,
)
def test_values_and_gradients(mesh, rows, length, heads, kv_heads):
    inputs, segments, d_out = draw(rows, length, heads, kv_heads)
    mesh = make_mesh(mesh)

    @jax.jit
    def both(inputs, segments, d_out):
        out, pull = jax.vjp(lambda q, k, v, sinks: spread(in_blocks, mesh, q, k, v, segments, sinks), *inputs)
        return out, pull(d_out)

    expected, pull = jax.vjp(lambda q, k, v, sinks: in_blocks(q, k, v, segments, sinks), *inputs)
    chex.assert_trees_all_close(both(inputs, segments, d_out), (expected, pull(d_out)), atol=1e-5, rtol=1e-5)


def test_with_the_kernel_of_tpus():
    inputs, segments, _ = draw(2, 32, 4, 2)
    mesh = make_mesh(dict(context=2, data=2, tensor=2))
    run = jax.jit(lambda q, k, v, sinks, segments: spread(by_splash, mesh, q, k, v, segments, sinks))
    chex.assert_trees_all_close(run(*inputs, segments), in_blocks(*inputs[:3], segments, inputs[3]), atol=1e-5)


def test_tokens_move_by_all_to_all_and_by_nothing_else():
    inputs, _, _ = draw(4, 32, 8, 8)
    mesh = make_mesh(dict(context=2, fsdp=4))
    placed = jax.device_put(inputs[:3], batch_sharding(mesh))
    run = jax.jit(lambda q, k, v: spread(in_blocks, mesh, q, k, v, None, None))
    text = run.lower(*placed).compile().as_text()
    assert text.count(" all-to-all(") == 4
    assert " all-gather(" not in text
