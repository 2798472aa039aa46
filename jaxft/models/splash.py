"""Attention by Pallas' splash kernels for TPUs: the scores of a block never leave the core's own memory.

The kernels take causality and windows as a mask known to the compiler, so they skip the blocks that it hides. They
compare segments as they run. Products have the TPU's default precision: bfloat16 operands, accumulated in float32.
float32 operands would be rounded to bfloat16, so they cannot use these kernels (`jaxft.models.kernels`).

Axes: B batch, T tokens, N query heads, K key-value heads, H head_dim.
"""

import math
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from jaxft.models.blockwise import Rule

BLOCKS = (512, 384, 256, 128)
"""Queries, and keys, in a block. With 512, scores and related arrays take 4 of the 16 MB that a kernel may use."""


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    rule: Rule,
    sinks: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale q kᵀ) v for q [B, T, N, H], k and v [B, T, K, H]: [B, T, N, H].

    Args:
        segments: [B, T] int32: tokens see their own segment only; one segment when absent.
        rule: its scale is multiplied into q, and rounded there to q's dtype.
        sinks: [N], as in `blockwise.attend`.
        interpret: run the kernels step by step in plain JAX, on any platform, for tests.
    """
    length, head_dim = q.shape[1], q.shape[3]
    block, padded = tiling(length)
    scale = 1 / math.sqrt(head_dim) if rule.scale is None else rule.scale
    q, k, v = (_by_head(x, padded) for x in (q * jnp.asarray(scale, q.dtype), k, v))
    ids = None
    if segments is not None:
        ids = jnp.pad(segments, ((0, 0), (0, padded - length)), constant_values=-1)
        ids = kernels.SegmentIds(ids, ids)
    kernel = _kernel(padded, block, q.shape[1], rule.window, rule.softcap, interpret)
    out = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(q, k, v, ids, sinks)
    return jnp.moveaxis(out[:, :, :length], 1, 2)


def tiling(length: int) -> tuple[int, int]:
    """Size of the blocks, and the length that rows are padded to: the least padding, in the largest blocks.

    >>> tiling(4096), tiling(600), tiling(50)
    ((512, 4096), (384, 768), (128, 128))
    """
    padded = {block: -(-length // block) * block for block in BLOCKS}
    block = min(BLOCKS, key=lambda block: (padded[block], -block))
    return block, padded[block]


def _by_head(x: jax.Array, padded: int) -> jax.Array:
    """[B, T, N, H] -> [B, N, T padded, H]."""
    return jnp.moveaxis(jnp.pad(x, ((0, 0), (0, padded - x.shape[1]), (0, 0), (0, 0))), 2, 1)


@lru_cache(maxsize=64)
def _kernel(
    length: int, block: int, heads: int, window: int | None, softcap: float | None, interpret: bool
) -> kernels.SplashAttentionKernel:
    """The kernel for rows of this length. Its mask is computed on the host, once, and held as NumPy arrays."""
    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), offset=0)
    with jax.ensure_compile_time_eval():
        kernel = kernels.make_splash_mha_single_device(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=kernels.BlockSizes(*(block,) * 8),
            attn_logits_soft_cap=softcap,
            residual_checkpoint_name="attention",  # see `jaxft.models.remat`
            interpret=interpret,
        )
    return jax.tree.map(np.asarray, kernel)
