"""Blocks along the last axis: `size` neighbours share one value, and the last block of a row may be short.

A block never crosses a row, so that rows can be sharded and stacks sliced. A short block behaves as if zeros
filled it up.
"""

import jax
import jax.numpy as jnp

SMALLEST_NORMAL = jnp.finfo(jnp.float32).tiny


def extremes(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Minimum and maximum of each block, f32 `[..., ceil(width / size)]`; a short block counts a zero too."""
    width = x.shape[-1]
    if width == size:  # XLA's CPU backend would copy x to give it another axis
        return x.min(-1, keepdims=True).astype(jnp.float32), x.max(-1, keepdims=True).astype(jnp.float32)
    if width % size:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -width % size)])
    blocks = x.reshape(*x.shape[:-1], -1, size)
    return blocks.min(-1).astype(jnp.float32), blocks.max(-1).astype(jnp.float32)


def absmax(x: jax.Array, size: int) -> jax.Array:
    """Largest magnitude of each block, f32 `[..., ceil(width / size)]`."""
    low, high = extremes(x, size)  # on CPU ten times faster than the maximum of magnitudes
    return jnp.abs(jnp.maximum(high, -low))


def reciprocal(scales: jax.Array) -> jax.Array:
    """1 / absmax, finite for blocks of zeros. Clamped, because devices disagree on whether subnormals are zero."""
    return 1 / jnp.maximum(scales, SMALLEST_NORMAL)


def spread(values: jax.Array, size: int, width: int) -> jax.Array:
    """One value per block to one per element: `[..., ceil(width / size)]` to `[..., width]`."""
    return jnp.repeat(values, size, axis=-1)[..., :width]
