"""The feed-forward block: down(act(gate(x)) * up(x)) (arXiv 2002.05202), or down(act(up(x)))."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.models.config import Clamp
from jaxft.models.keys import split
from jaxft.models.linear import Linear
from jaxft.models.remat import named

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class MLP(nnx.Module):
    """Has `gate_proj` and `up_proj`, or `gate_up_proj`, which gives gate, then up; or `up_proj` without a gate."""

    def __init__(self, activation: str, down_proj: Linear, **projections: Linear):
        for name, projection in projections.items():
            setattr(self, name, projection)
        self.down_proj = down_proj
        self.activation = activation

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """x [..., D] -> [..., D]."""
        keys = [None] * 3 if key is None else split(key, 3)
        if hasattr(self, "gate_up_proj"):
            inner = gated(*jnp.split(named(self.gate_up_proj(x, keys[0]), "mlp"), 2, axis=-1), self.activation, None)
        elif hasattr(self, "gate_proj"):
            gate, up = named(self.gate_proj(x, keys[0]), "mlp"), named(self.up_proj(x, keys[1]), "mlp")
            inner = gated(gate, up, self.activation, None)
        else:
            inner = ACTIVATIONS[self.activation](named(self.up_proj(x, keys[1]), "mlp"))
        return self.down_proj(inner, keys[2])


@partial(jax.checkpoint, static_argnums=(2, 3), prevent_cse=False)
def gated(gate: jax.Array, up: jax.Array, activation: str, clamp: Clamp | None) -> jax.Array:
    """act(gate) * up in float32, rounded once; with a clamp, gate * sigmoid(alpha gate) * (up + 1) of clamped values.

    The backward pass needs only gate and up.
    """
    gate32, up32 = gate.astype(jnp.float32), up.astype(jnp.float32)
    if clamp is None:
        product = ACTIVATIONS[activation](gate32) * up32
    else:
        gate32, up32 = jnp.minimum(gate32, clamp.limit), jnp.clip(up32, -clamp.limit, clamp.limit)
        product = gate32 * jax.nn.sigmoid(clamp.alpha * gate32) * (up32 + 1)
    return product.astype(gate.dtype)
