"""Causal self-attention with grouped queries, sliding windows, packing and a key-value cache.

Axes: B batch, T queries, S keys, K key-value heads, H head_dim, D hidden.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.models.blockwise import Reach, Rule
from jaxft.models.config import DecoderConfig, LayerSpec
from jaxft.models.kernels import Backend, attend
from jaxft.models.keys import split
from jaxft.models.linear import Linear
from jaxft.models.norms import Norm
from jaxft.models.remat import named
from jaxft.models.rope import rotate

Angles = Mapping[str, tuple[jax.Array, jax.Array]]
"""cos and sin of each of the model's rotary embeddings, by `LayerSpec.rope`."""


class LayerCache(NamedTuple):
    """Keys and values of one layer, [B, S, K, H] each."""

    keys: jax.Array
    values: jax.Array


class Setting(NamedTuple):
    """What all layers share: facts about the tokens, and how attention is computed.

    Attributes:
        angles: rotary angles of the tokens' positions.
        reach: which keys a token sees.
        segments: [B, T] int32; 0 is padding. Set even if `reach` has none, because causality replaces them there.
        backend: see `jaxft.models.kernels`.
    """

    angles: Angles
    reach: Reach
    segments: jax.Array | None
    backend: Backend


class Attention(nnx.Module):
    """Self-attention of one layer: `q_proj`, `k_proj`, `v_proj` (or `qkv_proj`, which gives all three), `o_proj` and,
    with `qk_norm`, `q_norm` and `k_norm`. Projections are laid out as in Hugging Face. `sinks` [N] are extra scores,
    one for each head.
    """

    def __init__(self, config: DecoderConfig, spec: LayerSpec, sinks: jax.Array | None, **parts: Linear | Norm):
        self.sinks = nnx.data(None if sinks is None else nnx.Param(sinks))
        for name, part in parts.items():
            setattr(self, name, part)
        self.config, self.spec = config, spec
        self.rule = Rule(spec.window, config.attention_scale, config.attention_softcap)

    def __call__(
        self,
        x: jax.Array,
        setting: Setting,
        cache: LayerCache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """x [B, T, D] -> [B, T, D], and the cache with this call's keys and values written at the queries' slots."""
        keys = [None] * 4 if key is None else split(key, 4)
        q, k, v = (named(each, "qkv") for each in self._projections(x, keys[:3]))
        if self.spec.rope is not None:
            rope = self.config.rope if self.spec.rope == "global" else self.config.local_rope
            q, k = (rotate(heads, *setting.angles[self.spec.rope], rope.interleaved) for heads in (q, k))
        if cache is not None:
            start = (0, setting.reach.offset, 0, 0)
            cache = LayerCache(
                *(jax.lax.dynamic_update_slice(c, n.astype(c.dtype), start) for c, n in zip(cache, (k, v), strict=True))
            )
            k, v = (c.astype(x.dtype) for c in cache)
        sinks = None if self.sinks is None else self.sinks[...]
        out = attend(setting.backend, q, k, v, setting.reach, self.rule, sinks, cached=cache is not None)
        return named(self.o_proj(out.reshape(*x.shape[:2], -1), keys[3]), "attention_out"), cache

    def _projections(self, x: jax.Array, keys: list[jax.Array | None]) -> list[jax.Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], normalised but not yet rotated."""
        c = self.config
        if c.fused_qkv:
            qkv = self.qkv_proj(x, keys[0])
            if c.fused_qkv == "by head":
                return list(jnp.split(qkv.reshape(*x.shape[:2], c.num_heads, -1), 3, axis=-1))
            ends = [c.num_heads * c.head_dim, (c.num_heads + c.num_kv_heads) * c.head_dim]
            qkv = jnp.split(qkv, ends, axis=-1)
        else:
            qkv = [each(x, key) for each, key in zip((self.q_proj, self.k_proj, self.v_proj), keys, strict=True)]
        if c.qk_norm == "projection":
            qkv = [self.q_norm(qkv[0]), self.k_norm(qkv[1]), qkv[2]]
        q, k, v = (part.reshape(*x.shape[:2], -1, c.head_dim) for part in qkv)
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return [q, k, v]
