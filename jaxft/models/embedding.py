"""The embedding: one row of a matrix for each token.

On a mesh its columns are cut. Each device looks up its columns for the tokens of all devices that share the matrix, and
they exchange the results. What they send has the size of the activations, not of the vocabulary.

Axes: B batch, T tokens, D hidden, V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxft.models.linear import matmul
from jaxft.sharding.layout import Layout, names_of
from jaxft.sharding.mesh import BATCH_AXES, batch_ways


class Embedding(nnx.Module):
    """Rows of `weight` [V, D]."""

    def __init__(self, weight: jax.Array):
        self.weight = nnx.Param(weight)
        self.layout: Layout | None = None

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """tokens [B, T] int32 -> [B, T, D]."""
        weight = self.weight[...]
        if self.layout is None:
            return jnp.take(weight, tokens, axis=0).astype(dtype)
        mesh = self.layout.mesh
        cut = [name for name in names_of(self.layout.stored, 1) if mesh.shape[name] > 1]
        if not cut or tokens.shape[0] % batch_ways(mesh):
            weight = jax.lax.with_sharding_constraint(weight, self.layout.sharding(self.layout.gathered))
            return jnp.take(weight, tokens, axis=0).astype(dtype)
        rows = P(BATCH_AXES, "context" if tokens.shape[1] % mesh.shape["context"] == 0 else None)

        def look_up(columns: jax.Array, tokens: jax.Array) -> jax.Array:
            if "fsdp" in cut:
                tokens = jax.lax.all_gather(tokens, "fsdp")
            found = jnp.take(columns, tokens, axis=0).astype(dtype)
            if "fsdp" in cut:
                found = jax.lax.all_to_all(found, "fsdp", 0, found.ndim - 1, tiled=True)[0]
            return jax.lax.all_gather(found, "tensor", axis=2, tiled=True) if "tensor" in cut else found

        specs = self.layout.stored, rows
        return jax.shard_map(look_up, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(weight, tokens)

    def product(self, h: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
        """h Wᵀ, for an output head that shares the embedding's weight."""
        return matmul(h, self.weight[...], self.layout, out_dtype)
