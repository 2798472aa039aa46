"""Causal self-attention with grouped queries, sliding windows, packing and a key-value cache.

Axes: B batch, T queries, S keys, N query heads, K key-value heads, G = N/K, H head_dim, D hidden.
A token attends to the tokens of its own segment at or before its slot. Segment 0 is padding.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.models.config import DecoderConfig
from jaxft.models.linear import Linear
from jaxft.models.norms import RMSNorm
from jaxft.models.rope import rotate


class Slots(NamedTuple):
    """Where queries and keys stand in the row, and which segment they belong to (None: all one segment)."""

    query: jax.Array  # [T] int32
    key: jax.Array  # [S] int32
    query_segments: jax.Array | None  # [B, T] int32
    key_segments: jax.Array | None  # [B, S] int32

    def mask(self, window: int | None) -> jax.Array:
        """True where a query may look: [1 or B, T, S]."""
        distance = self.query[:, None] - self.key[None, :]
        allowed = distance >= 0
        if window is not None:
            allowed &= distance < window
        if self.query_segments is None:
            return allowed[None]
        return allowed[None] & (self.query_segments[:, :, None] == self.key_segments[:, None, :])


class LayerCache(NamedTuple):
    """Keys and values of one layer, [B, S, K, H] each."""

    keys: jax.Array
    values: jax.Array


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """softmax(q kᵀ / √H) v for q [B, T, N, H], k and v [B, S, K, H], mask [1 or B, T, S]: [B, T, N, H].

    Scores and softmax are float32.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores / math.sqrt(head_dim), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)


class Attention(nnx.Module):
    """Self-attention of one layer. Projections are named and laid out as in Hugging Face."""

    def __init__(
        self,
        config: DecoderConfig,
        q_proj: Linear,
        k_proj: Linear,
        v_proj: Linear,
        o_proj: Linear,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
        window: int | None,
    ):
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = q_proj, k_proj, v_proj, o_proj
        self.q_norm, self.k_norm = nnx.data(q_norm), nnx.data(k_norm)
        self.head_dim = config.head_dim
        self.window = window

    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        slots: Slots,
        cache: LayerCache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """x [B, T, D] -> [B, T, D], and the cache with this call's keys and values written at `slots.query`."""
        keys = [None] * 4 if key is None else jax.random.split(key, 4)
        q, k, v = (
            self._heads(projection(x, drop))
            for projection, drop in zip((self.q_proj, self.k_proj, self.v_proj), keys[:3], strict=True)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            start = (0, slots.query[0], 0, 0)
            cache = LayerCache(
                *(jax.lax.dynamic_update_slice(c, n.astype(c.dtype), start) for c, n in zip(cache, (k, v), strict=True))
            )
            k, v = (c.astype(x.dtype) for c in cache)
        out = attend(q, k, v, slots.mask(self.window))
        return self.o_proj(out.reshape(*x.shape[:2], -1), keys[3]), cache

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, self.head_dim)
