"""Rotary position embedding, in halves as in Hugging Face or interleaved, with every context-extension method.

Sources: RoFormer (arXiv 2104.09864); position interpolation (2306.15595); dynamic NTK (reddit bloc97, as in
transformers); YaRN (2309.00071); LongRoPE (2402.13753); Llama 3.1's frequency-dependent scaling.

Axes: B batch, T tokens, N heads, H head_dim, R rotated dimensions.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.models.config import Rope


def rotary_angles(rope: Rope, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each [B, T, R/2] float32, for integer positions [B, T].

    `dynamic` and `longrope` choose their frequencies by the longest position in the batch, as transformers does.
    """
    frequencies, scale = _frequencies(rope, jnp.max(positions) + 1)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False) -> jax.Array:
    """Rotate the first R dimensions of x [B, T, N, H], in pairs; cos and sin are [B, T, R/2]. See `Rope`."""
    cos, sin = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
    turning, still = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    if interleaved:
        first, second = turning[..., ::2], turning[..., 1::2]
    else:
        first, second = jnp.split(turning, 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        return jnp.concatenate([jnp.stack(turned, axis=-1).reshape(turning.shape), still], axis=-1)
    return jnp.concatenate([*turned, still], axis=-1)


def _frequencies(rope: Rope, length: jax.Array) -> tuple[jax.Array, float]:
    """Inverse frequencies [R/2] and the factor on cos and sin, for a sequence of `length` tokens."""
    p = dict(rope.parameters)
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    plain = np.float32(1) / np.float32(rope.theta) ** exponents
    match rope.type:
        case "default":
            return jnp.asarray(plain), 1.0
        case "linear":
            return jnp.asarray(plain / np.float32(p["factor"])), 1.0
        case "dynamic":
            return _dynamic_ntk(rope, p["factor"], exponents, length), 1.0
        case "llama3":
            return jnp.asarray(_llama3(plain, **p)), 1.0
        case "yarn":
            return _yarn(rope, plain, p)
        case "longrope":
            return _longrope(rope, exponents, p, length)
    raise ValueError(f"rope type {rope.type!r} is not known; known: default, linear, dynamic, llama3, yarn, longrope")


def _dynamic_ntk(rope: Rope, factor: float, exponents: np.ndarray, length: jax.Array) -> jax.Array:
    stretch = factor * jnp.maximum(length, rope.max_positions).astype(jnp.float32) / rope.max_positions - (factor - 1)
    theta = rope.theta * stretch ** (rope.dim / (rope.dim - 2))
    return 1.0 / theta**exponents


def _llama3(
    plain: np.ndarray,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> np.ndarray:
    """Frequencies of short wavelengths stay, those of long ones are divided by `factor`, others are blended."""
    turns = np.float32(original_max_position_embeddings) * plain / np.float32(2 * math.pi)
    blend = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return (plain * blend + plain / factor * (1 - blend)).astype(np.float32)


def _yarn(rope: Rope, plain: np.ndarray, p: dict) -> tuple[jax.Array, float]:
    original = p["original_max_position_embeddings"]
    factor = p.get("factor") or rope.max_positions / original

    def attention_scale(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    scale = p.get("attention_factor")
    if scale is None:
        both = p.get("mscale") and p.get("mscale_all_dim")
        scale = attention_scale(p["mscale"]) / attention_scale(p["mscale_all_dim"]) if both else attention_scale(1)

    def dimension_turning(turns: float) -> float:
        return rope.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_turning(p.get("beta_fast") or 32), dimension_turning(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - low) / (high - low or 0.001), 0, 1)
    return jnp.asarray((plain / factor * ramp + plain * (1 - ramp)).astype(np.float32)), float(scale)


def _longrope(rope: Rope, exponents: np.ndarray, p: dict, length: jax.Array) -> tuple[jax.Array, float]:
    original = p["original_max_position_embeddings"]
    factor = p.get("factor") or rope.max_positions / original
    scale = p.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    long, short = (
        np.float32(1) / (np.asarray(p[key], np.float32) * np.float32(rope.theta) ** exponents)
        for key in ("long_factor", "short_factor")
    )
    return jnp.where(length > original, long, short), float(scale)
