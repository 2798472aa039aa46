"""Root-mean-square (arXiv 1910.07467) and layer normalisation (1607.06450), computed in float32."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

Kind = Literal["rms", "rms_offset", "layer", "layer_bias"]


class Norm(nnx.Module):
    """Normalised x, times `weight` [..., D]; see `DecoderConfig.norm` for the kinds."""

    def __init__(self, kind: Kind, weight: jax.Array, bias: jax.Array | None, eps: float):
        self.weight = nnx.Param(weight)
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))
        self.kind, self.eps = kind, eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., D]."""
        return _norm(x, self.weight[...], None if self.bias is None else self.bias[...], self.kind, self.eps)


@partial(jax.checkpoint, static_argnums=(3, 4), prevent_cse=False)
def _norm(x: jax.Array, weight: jax.Array, bias: jax.Array | None, kind: Kind, eps: float) -> jax.Array:
    """The backward pass needs x only."""
    x32 = x.astype(jnp.float32)
    if kind in ("layer", "layer_bias"):
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    match kind:
        case "rms":
            return weight.astype(x.dtype) * normed.astype(x.dtype)
        case "rms_offset":
            return (normed * (1 + weight.astype(jnp.float32))).astype(x.dtype)
    scaled = normed * weight.astype(jnp.float32)
    return (scaled if bias is None else scaled + bias.astype(jnp.float32)).astype(x.dtype)
