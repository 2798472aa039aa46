"""Next-token cross-entropy that never holds the logits of a whole batch.

The output head is applied to a few tokens at a time. When gradients are wanted, each chunk's gradient with respect
to its hidden states (and to the head, where the head is trained) is computed right there, while its logits are at
hand, so the backward pass only scales it: one pass over the vocabulary, nothing recomputed, and no array with
tokens x vocabulary elements.

Sums and counts are returned, never means: the division happens once, over all micro-batches and devices.

Axes: B batch, T tokens, D hidden, V vocabulary, C tokens per chunk.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any

CHUNK_LOGITS = 1 << 24
"""Logits held at a time; 16M of them take 64 MB in float32."""


def next_token_targets(tokens: jax.Array, loss_mask: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Targets [B, T] and weights [B, T]: position t predicts token t + 1 where that is supervised.

    A token is supervised when its `loss_mask` says so and its predecessor is in the same segment.
    """
    targets = jnp.roll(tokens, -1, axis=1)
    wanted = jnp.roll(loss_mask, -1, axis=1) & (jnp.roll(segments, -1, axis=1) == segments) & (segments > 0)
    return targets, wanted.at[:, -1].set(False).astype(jnp.float32)


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target) for logits [..., V] float32 and targets [...]: [...] float32."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def cross_entropy(
    unembed: Callable[[PyTree, PyTree, jax.Array], jax.Array],
    trained: PyTree,
    frozen: PyTree,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    vocab_size: int,
) -> jax.Array:
    """Sum over tokens of weight times cross-entropy: a float32 scalar.

    Args:
        unembed: (trained, frozen, hidden states [..., D]) -> logits [..., V] float32; closes over no arrays.
        trained: the head's parameters that have gradients; may be empty.
        frozen: those that have none.
        hidden: [B, T, D].
        targets: [B, T] int32.
        weights: [B, T] float32; 0 for tokens that are not supervised.
        vocab_size: V, which decides the size of a chunk.
    """
    batch, length, _ = hidden.shape
    width = _chunk_width(batch, length, vocab_size)
    return _summed(unembed, width, trained, frozen, hidden, targets, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(unembed, width, trained, frozen, hidden, targets, weights):
    def add(total, chunk):
        h, target, weight = chunk
        return total + jnp.sum(weight * token_losses(unembed(trained, frozen, h), target)), None

    total, _ = jax.lax.scan(add, jnp.float32(0), _chunks(width, hidden, targets, weights))
    return total


def _summed_forward(unembed, width, trained, frozen, hidden, targets, weights):
    def add(carry, chunk):
        total, d_trained = carry
        h, target, weight = chunk
        logits, pull = jax.vjp(lambda trained, h: unembed(trained, frozen, h), trained, h)
        loss, d_logits = jax.value_and_grad(lambda z: jnp.sum(weight * token_losses(z, target)))(logits)
        more, d_hidden = pull(d_logits)
        return (total + loss, jax.tree.map(jnp.add, d_trained, more)), d_hidden

    start = jnp.float32(0), jax.tree.map(jnp.zeros_like, trained)
    (total, d_trained), d_hidden = jax.lax.scan(add, start, _chunks(width, hidden, targets, weights))
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])
    return total, (d_trained, d_hidden[:, : hidden.shape[1]])


def _summed_backward(unembed, width, residuals, scale):
    d_trained, d_hidden = jax.tree.map(lambda gradient: gradient * scale.astype(gradient.dtype), residuals)
    return d_trained, None, d_hidden, None, None


_summed.defvjp(_summed_forward, _summed_backward)


def _chunk_width(batch: int, length: int, vocab_size: int) -> int:
    """Tokens of each row in a chunk: as many equal parts as CHUNK_LOGITS asks for."""
    parts = max(1, -(-batch * length * vocab_size // CHUNK_LOGITS))
    return -(-length // min(parts, length))


def _chunks(width: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Cut [B, T, ...] along T into [N, B, C, ...], zero-padding the last chunk."""

    def cut(x: jax.Array) -> jax.Array:
        count = -(-x.shape[1] // width)
        padding = [(0, 0), (0, count * width - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
        return jnp.moveaxis(jnp.pad(x, padding).reshape(x.shape[0], count, width, *x.shape[2:]), 1, 0)

    return tuple(cut(x) for x in arrays)
