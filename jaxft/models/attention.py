"""Causal self-attention with grouped queries, sliding windows, packing and a key-value cache.

Axes: B batch, T queries, S keys, K key-value heads, H head_dim, D hidden.
"""

from typing import NamedTuple

import jax
from flax import nnx

from jaxft.models.blockwise import Reach, attend
from jaxft.models.config import DecoderConfig
from jaxft.models.linear import Linear
from jaxft.models.norms import RMSNorm
from jaxft.models.rope import rotate


class LayerCache(NamedTuple):
    """Keys and values of one layer, [B, S, K, H] each."""

    keys: jax.Array
    values: jax.Array


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
        reach: Reach,
        cache: LayerCache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """x [B, T, D] -> [B, T, D], and the cache with this call's keys and values written at the queries' slots."""
        keys = [None] * 4 if key is None else jax.random.split(key, 4)
        q, k, v = (
            self._heads(projection(x, drop))
            for projection, drop in zip((self.q_proj, self.k_proj, self.v_proj), keys[:3], strict=True)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            start = (0, reach.offset, 0, 0)
            cache = LayerCache(
                *(jax.lax.dynamic_update_slice(c, n.astype(c.dtype), start) for c, n in zip(cache, (k, v), strict=True))
            )
            k, v = (c.astype(x.dtype) for c in cache)
        out = attend(q, k, v, reach, self.window)
        return self.o_proj(out.reshape(*x.shape[:2], -1), keys[3]), cache

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, self.head_dim)
