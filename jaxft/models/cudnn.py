"""Attention by cuDNN's flash kernels for NVIDIA GPUs, through `jax.nn`.

These kernels have no segments. A row that holds one example, padded on the right, needs none: padding comes after the
example, so causality hides it. The outputs at padding do not matter, because they have no loss and no token of the
example sees them. Rows that hold several examples cannot use these kernels (`jaxft.models.kernels`).

jax also has a private interface that takes offsets for packed rows. It is not used: it steps through keys and values by
the number of query heads, which is wrong if there are fewer key-value heads, and no public contract covers it.

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
