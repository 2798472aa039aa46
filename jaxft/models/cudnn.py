"""Attention by cuDNN's flash kernels for NVIDIA GPUs, through `jax.nn`.

They know no segments. Rows that hold one example, padded on the right, need none: padding comes after the example,
so causality hides it, and what padding itself sees is of no consequence, because no loss is taken there and no token
of the example sees it. Rows that hold several examples are no case for these kernels (`jaxft.models.kernels`).

jax also has a private interface of offsets for packed rows. It is not used: it steps through keys and values by the
number of query heads, which is wrong where there are fewer of them, and nothing public holds it to anything.

Axes: B batch, T tokens, N query heads, K key-value heads, H head_dim.
"""

import jax

from jaxft.models.blockwise import Rule


def attend(q: jax.Array, k: jax.Array, v: jax.Array, rule: Rule) -> jax.Array:
    """softmax(scale q kᵀ) v for q [B, T, N, H], k and v [B, T, K, H], bfloat16 or float16: [B, T, N, H]."""
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=rule.scale,
        is_causal=True,
        local_window_size=None if rule.window is None else (rule.window - 1, 0),
        implementation="cudnn",
    )
