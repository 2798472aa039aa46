"""Exact softmax attention a block of queries and a block of keys at a time (arXiv 2112.05682, 2205.14135).

Only the scores of one pair of blocks exist at a time. The forward pass folds blocks of keys into a running softmax;
blocks that causality or the window hides are not visited. It saves the output and the log-sum-exp of each query's
scores; the backward pass computes the scores again.

Axes: B batch, T queries, S keys, N query heads, K key-value heads, G = N/K, H head_dim, b queries or keys in a block.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxft.models.linear import as_stored, precision
from jaxft.models.remat import named

BLOCK = 256
"""Most queries, and most keys, in a block on a CPU."""

HIDDEN = -1e30
"""Score of a key that a query may not see. Finite, so that a block in which it sees nothing gives no NaN."""


class Reach(NamedTuple):
    """Which keys a query sees: keys at or before its slot, in the window, and of its segment.

    Query t has slot `offset` + t, key s has slot s.
    """

    offset: jax.Array  # int32 scalar
    query_segments: jax.Array | None  # [B, T] int32; None: all one segment
    key_segments: jax.Array | None  # [B, S] int32


class Rule(NamedTuple):
    """How queries attend to keys, the same for all queries.

    Attributes:
        window: a query sees the last `window` keys, its own included.
        scale: factor on scores; 1/√H when absent.
        softcap: c in c tanh(score / c).
    """

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    reach: Reach,
    rule: Rule,
    block: int = BLOCK,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale q kᵀ) v for q [B, T, N, H], k and v [B, S, K, H]: [B, T, N, H].

    Scores and softmax are float32. Every query must see at least one key; its own is enough. `sinks` [N] are
    one extra score for each head, which takes part in the softmax but has no value.
    """
    rule = rule._replace(scale=1 / math.sqrt(q.shape[-1]) if rule.scale is None else rule.scale)
    q_blocks, k_blocks = _blocks(q.shape[1], block), _blocks(k.shape[1], block)
    cut = Reach(
        reach.offset,
        None if reach.query_segments is None else _cut(reach.query_segments, 1, q_blocks, fill=-2),
        None if reach.key_segments is None else _cut(reach.key_segments, 1, k_blocks, fill=-3),
    )
    return _attend(q, k, v, None if sinks is None else sinks.astype(jnp.float32), cut, rule, (q_blocks, k_blocks))


Cuts = tuple[tuple[int, int], tuple[int, int]]
"""Number and size of the blocks of queries, then of the blocks of keys."""


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, reach: Reach, rule: Rule, cuts: Cuts
) -> jax.Array:
    return _forward(q, k, v, sinks, reach, rule, cuts)[0]


def _in_blocks(x: jax.Array, heads: int, blocks: tuple[int, int]) -> jax.Array:
    """[B, T, N, H] -> [n, B, K, G, b, H], in n blocks of b."""
    return _cut(jnp.moveaxis(x.reshape(*x.shape[:2], heads, -1, x.shape[3]), 1, 3), 3, blocks)


def _out_of_blocks(x: jax.Array, length: int) -> jax.Array:
    """[n, B, K, G, b, H] -> [B, T, N, H]."""
    rows = jnp.moveaxis(x, (0, 4), (1, 2))
    return rows.reshape(rows.shape[0], -1, x.shape[2] * x.shape[3], x.shape[5])[:, :length]


def _forward(q, k, v, sinks, reach, rule, cuts):
    """Saves inputs and output in their own layout, because blocks would be laid out again for the backward pass. Only
    the log-sum-exp, a number for each query, stays in blocks."""
    kept, (length, kv_heads) = (q, k, v, sinks, reach), (q.shape[1], k.shape[2])
    q, (k, v) = _in_blocks(q, kv_heads, cuts[0]), (_in_blocks(x, kv_heads, cuts[1])[:, :, :, 0] for x in (k, v))
    sinks = None if sinks is None else sinks.reshape(kv_heads, -1)

    def one_block_of_queries(_, i):
        def fold(j, running):
            highest, total, out = running
            scores = _capped(rule, _product("bkgqh,bksh->bkgqs", q[i], k[j]))
            scores = jnp.where(_visible(reach, rule.window, q, k, i, j)[:, None, None], scores, HIDDEN)
            new_highest = jnp.maximum(highest, scores.max(axis=-1))
            weights = jnp.exp(scores - new_highest[..., None])
            shrink = jnp.exp(highest - new_highest)
            more = _product("bkgqs,bksh->bkgqh", weights.astype(v.dtype), v[j])
            return new_highest, total * shrink + weights.sum(axis=-1), out * shrink[..., None] + more

        rows = q.shape[1:5]
        highest, total = jnp.full(rows, HIDDEN), jnp.zeros(rows)
        if sinks is not None:
            highest, total = jnp.broadcast_to(sinks[..., None], rows), jnp.ones(rows)
        start = highest, total, jnp.zeros((*rows, q.shape[5]))
        highest, total, out = jax.lax.fori_loop(*_seen_from(reach, rule.window, q, k, i), fold, start)
        return None, ((out / total[..., None]).astype(q.dtype), highest + jnp.log(total))

    _, computed = jax.lax.scan(one_block_of_queries, None, jnp.arange(q.shape[0]))
    out, log_total = named(_out_of_blocks(computed[0], length), "attention"), named(computed[1], "attention")
    return out, (*kept, out, log_total)


def _backward(rule, cuts, residuals, d_out):
    """Scores are computed as keys x queries, so that no product has to transpose its large operand."""
    q, k, v, sinks, reach, out, log_total = residuals
    length, kv_length, kv_heads = q.shape[1], k.shape[1], k.shape[2]
    along = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    q, d_out, along = (_in_blocks(x, kv_heads, cuts[0]) for x in (q, d_out, along))
    k, v = (_in_blocks(x, kv_heads, cuts[1])[:, :, :, 0] for x in (k, v))
    along = along[..., 0]  # [n, B, K, G, b]

    def one_block_of_queries(carry, i):
        def add(j, sums):
            d_q, d_k, d_v = sums
            scores = _capped(rule, _product("bksh,bkgqh->bksgq", k[j], q[i]))
            weights = jnp.exp(scores - log_total[i][:, :, None])
            seen = jnp.swapaxes(_visible(reach, rule.window, q, k, i, j), 1, 2)
            weights = jnp.where(seen[:, None, :, None], weights, 0.0)
            d_weights = _product("bksh,bkgqh->bksgq", v[j], d_out[i])
            d_scores = weights * (d_weights - along[i][:, :, None]) * rule.scale
            if rule.softcap is not None:
                d_scores = d_scores * (1 - jnp.square(scores / rule.softcap))
            d_scores = d_scores.astype(q.dtype)
            d_v = d_v.at[j].add(_product("bksgq,bkgqh->bksh", weights.astype(q.dtype), d_out[i]))
            d_k = d_k.at[j].add(_product("bksgq,bkgqh->bksh", d_scores, q[i]))
            return d_q + _product("bkhs,bksgq->bkhgq", as_stored(jnp.swapaxes(k[j], 2, 3)), d_scores), d_k, d_v

        b, heads, groups, size, head_dim = q.shape[1:]
        d_q = jnp.zeros((b, heads, head_dim, groups, size))
        d_q, d_k, d_v = jax.lax.fori_loop(*_seen_from(reach, rule.window, q, k, i), add, (d_q, *carry))
        return (d_k, d_v), jnp.moveaxis(d_q, 2, 4).astype(q.dtype)

    start = jnp.zeros(k.shape), jnp.zeros(v.shape)
    (d_k, d_v), d_q = jax.lax.scan(one_block_of_queries, start, jnp.arange(q.shape[0]))
    d_sinks = None
    if sinks is not None:
        by_head = sinks.reshape(kv_heads, -1, 1)
        d_sinks = -jnp.sum(jnp.exp(by_head - log_total) * along, axis=(0, 1, 4)).reshape(-1)
    d_k, d_v = (_out_of_blocks(x.astype(k.dtype)[:, :, :, None], kv_length) for x in (d_k, d_v))
    return _out_of_blocks(d_q, length), d_k, d_v, d_sinks, None


_attend.defvjp(_forward, _backward)


def _seen_from(reach: Reach, window: int | None, q: jax.Array, k: jax.Array, i: jax.Array) -> tuple:
    """First and one past the last block of keys that block i of queries can see."""
    first_query = reach.offset + i * q.shape[4]
    last_query = first_query + q.shape[4] - 1
    end = jnp.minimum(last_query // k.shape[3] + 1, k.shape[0])
    start = jnp.int32(0) if window is None else jnp.maximum(first_query - window + 1, 0) // k.shape[3]
    return start, end


def _visible(reach: Reach, window: int | None, q: jax.Array, k: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
    """Which keys of block j the queries of block i see: [1 or B, b, b]."""
    queries = reach.offset + i * q.shape[4] + jnp.arange(q.shape[4])
    distance = queries[:, None] - (j * k.shape[3] + jnp.arange(k.shape[3]))[None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if reach.query_segments is None:
        return visible[None]
    return visible & (reach.query_segments[i][:, :, None] == reach.key_segments[j][:, None, :])


def _capped(rule: Rule, products: jax.Array) -> jax.Array:
    scores = products * rule.scale
    return scores if rule.softcap is None else rule.softcap * jnp.tanh(scores / rule.softcap)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, precision=precision(a.dtype), preferred_element_type=jnp.float32)


def _blocks(length: int, block: int) -> tuple[int, int]:
    """Number and size of equal blocks."""
    count = -(-length // block)
    return count, -(-length // count)


def _cut(x: jax.Array, axis: int, blocks: tuple[int, int], fill: int = 0) -> jax.Array:
    """Cut an axis into blocks, padding the last; the blocks come first."""
    count, size = blocks
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, count * size - x.shape[axis])
    padded = jnp.pad(x, padding, constant_values=fill)
    return jnp.moveaxis(padded.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)
