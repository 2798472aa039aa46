"""Low-rank adapters on linear layers: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353).

The weight W does not change. With A [r, in] and B [out, r] the layer computes W x + s B A x, where s is alpha / r, or
alpha / sqrt(r) with rsLoRA. DoRA also learns the length m of each row of W + s B A and takes only the direction from
the sum: m / |W + s B A| * (W + s B A) x.

Layers are stacked, but their adapters may differ. Smaller ranks are padded with zeros up to the largest, and a layer
without adapter has rank 0. The padding stays zero: if a row of A and the column of B are both zero, so are their
gradients.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.models.linear import Adapter, Linear, matmul
from jaxft.models.remat import named
from jaxft.quantization.qtensor import QTensor
from jaxft.sharding.layout import Layout, over_fsdp_too


@dataclass(frozen=True)
class LoraSpec:
    """Rank and alpha of every module in a stack (one entry if there is no stack); rank 0 means no adapter."""

    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    use_rslora: bool = False
    use_dora: bool = False
    dropout: float = 0.0

    @property
    def max_rank(self) -> int:
        return max(self.ranks)

    @property
    def scales(self) -> tuple[float, ...]:
        """s of each module; 0 without an adapter."""
        return tuple(
            alpha / (math.sqrt(rank) if self.use_rslora else rank) if rank else 0.0
            for rank, alpha in zip(self.ranks, self.alphas, strict=True)
        )


class Frozen(nnx.Variable):
    """A value that an adapter derives from its base and that is not trained."""


class LoRA(nnx.Module):
    """The adapter of a linear layer, of a stack of them, or of experts, which use its arrays in their own products.

    `A` [..., r, in], `B` [..., out, r] and, with DoRA, `magnitude` [..., out] are trained, in float32; `scale` [...] is
    s. The products are computed in the dtype of the activations and accumulated in float32.
    """

    by_output = ("B", "magnitude", "row_squares")

    def __init__(
        self,
        spec: LoraSpec,
        scale: jax.Array,
        A: jax.Array,
        B: jax.Array,
        magnitude: jax.Array | None = None,
        row_squares: jax.Array | None = None,
    ):
        self.spec = spec
        self.A, self.B = Adapter(A), Adapter(B)
        self.scale = Frozen(scale)
        self.magnitude = nnx.data(Adapter(magnitude) if spec.use_dora else None)
        self.row_squares = nnx.data(Frozen(row_squares) if spec.use_dora else None)
        self.layout_A: Layout | None = None
        self.layout_B: Layout | None = None

    def bind(self, layout: Layout) -> list[tuple[nnx.Variable, NamedSharding]]:
        """Cut the adapter like its weight: A along columns, B along rows. Both are also cut over `fsdp`, although the
        weight is cut over `fsdp` along only one of them. Gives each variable with its sharding."""
        *outer, rows, columns = layout.stored
        features_out, features_in = self.B.get_value().shape[-2], self.A.get_value().shape[-1]
        self.layout_A = Layout(layout.mesh, P(*outer, None, over_fsdp_too(layout.mesh, columns, features_in)))
        self.layout_B = Layout(layout.mesh, P(*outer, over_fsdp_too(layout.mesh, rows, features_out), None))
        by_row, whole = Layout(layout.mesh, P(rows)), Layout(layout.mesh, P())
        parts = [(self.A, self.layout_A), (self.B, self.layout_B), (self.scale, whole)]
        if self.spec.use_dora:
            parts += [(self.magnitude, by_row), (self.row_squares, by_row)]
        return [(variable, cut.stacked(variable.get_value().ndim)) for variable, cut in parts]

    def unbind(self) -> None:
        """Forget how the arrays are cut on a mesh."""
        self.layout_A = self.layout_B = None

    def __call__(self, linear: Linear, x: jax.Array, key: jax.Array | None, out_dtype: jnp.dtype | None) -> jax.Array:
        """The adapted product for x [..., in], without the bias: [..., out]."""
        dropped = x if key is None or self.spec.dropout == 0 else _dropout(x, self.spec.dropout, key)
        base = linear.product(x, out_dtype)
        update = self._low_rank(dropped, out_dtype)
        if self.magnitude is None:
            return base + update
        gain = self._gain(linear)
        again = base if dropped is x else linear.product(dropped, out_dtype)
        return (base + (gain - 1).astype(base.dtype) * again) + gain.astype(base.dtype) * update

    def _low_rank(self, x: jax.Array, out_dtype: jnp.dtype | None) -> jax.Array:
        z = named(self.scale[...].astype(x.dtype) * matmul(x, self.A[...], self.layout_A), "lora")
        return matmul(z, self.B[...], self.layout_B, out_dtype)

    def _gain(self, linear: Linear) -> jax.Array:
        """m / |W + s B A| by row, [out] float32, with the length as a constant (DoRA section 4.3).

        The length is computed without forming the sum: |W|² + 2 s W·BA + s² |BA|², each term of rank r. Layers without
        adapter keep gain 1.
        """
        A, B, scale = self.A[...], self.B[...], self.scale[...]
        across = jnp.sum(linear.product(A).T * B, axis=-1)
        low_rank = jnp.sum(matmul(B, matmul(A, A)) * B, axis=-1)
        squares = self.row_squares[...] + 2 * scale * across + scale**2 * low_rank
        length = jax.lax.stop_gradient(jnp.sqrt(squares))
        return jnp.where(scale == 0, 1.0, self.magnitude[...] / length)


def _dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Dropout with one key, or with one key for each row of x [B, ..., in]."""
    if key.ndim:
        keep = jax.vmap(partial(jax.random.bernoulli, p=1 - rate, shape=x.shape[1:]))(key)
    else:
        keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


@jax.jit
def row_squares(weight: jax.Array | QTensor) -> jax.Array:
    """|W|² of each row, float32 [..., out]. A stack takes one matrix at a time, so that only one is in float32."""
    if weight.ndim > 2:
        return jax.lax.map(row_squares, weight)
    dense = weight.dequantize(jnp.float32) if isinstance(weight, QTensor) else weight.astype(jnp.float32)
    return jnp.sum(dense * dense, axis=-1)
