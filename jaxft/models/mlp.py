"""The gated feed-forward block (arXiv 2002.05202): down(act(gate(x)) * up(x))."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.models.linear import Linear

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class MLP(nnx.Module):
    def __init__(self, gate_proj: Linear, up_proj: Linear, down_proj: Linear, activation: str):
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.activation = activation

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """x [..., D] -> [..., D]."""
        keys = [None] * 3 if key is None else jax.random.split(key, 3)
        gated = _gated(self.gate_proj(x, keys[0]), self.up_proj(x, keys[1]), self.activation)
        return self.down_proj(gated, keys[2])


@partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def _gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    """act(gate) * up in float32, rounded once. The backward pass needs gate and up only."""
    product = ACTIVATIONS[activation](gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return product.astype(gate.dtype)
