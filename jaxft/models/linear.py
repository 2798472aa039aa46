"""The linear layer: the matmul with a weight, and the place where a frozen base meets its adapter.

`matmul` dispatches on its weight: an array, or a `QTensor` that it dequantizes. Its backward pass starts again
from the stored weight. Autodiff would save every dequantized weight for the backward pass, which costs exactly the
memory that quantization saves. The same holds for sharded weights: `matmul` saves only the shard, and gathers it (as
codes, when quantized) once in the forward and once in the backward pass.
"""

from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.quantization.qtensor import QTensor
from jaxft.sharding.layout import Layout

Weight = jax.Array | QTensor


class Adapter(nnx.Variable):
    """Marks the variables that adapters add to a frozen base: `nnx.split(model, Adapter, ...)` separates them."""


class LinearAdapter(Protocol):
    """An adapter that a linear layer may carry: it computes the adapted x Wᵀ for the layer it sits on.

    Attributes:
        by_output: the names of its variables that have a row for each output feature.
    """

    by_output: tuple[str, ...]

    def unbind(self) -> None:
        """Forget how its arrays are cut on a mesh."""
        ...

    def __call__(
        self, linear: "Linear", x: jax.Array, key: jax.Array | None, out_dtype: jnp.dtype | None
    ) -> jax.Array: ...


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: jax.Array, weight: Weight, layout: Layout | None = None, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """x [..., in] times weight [out, in], transposed: [..., out], accumulated in float32.

    Args:
        x: its dtype is the dtype of the operands; the weight is cast to it.
        weight: an array, or a `QTensor`, which has no gradient.
        layout: how the weight is sharded.
        out_dtype: dtype of the result; x's when absent.
    """
    return contract(x, _ready(weight, x.dtype, layout), (x.ndim - 1,), (1,), out_dtype or x.dtype)


def _forward(x, weight, layout, out_dtype):
    return matmul(x, weight, layout, out_dtype), (x, weight)


def _backward(layout, out_dtype, residuals, dy):
    x, weight = residuals
    dy = dy.astype(x.dtype)
    dx = contract(dy, _ready(weight, x.dtype, layout), (dy.ndim - 1,), (0,), x.dtype)
    if isinstance(weight, QTensor):
        return dx, None
    return dx, _outer(dy, x).astype(weight.dtype)


matmul.defvjp(_forward, _backward)


def _outer(dy: jax.Array, x: jax.Array) -> jax.Array:
    """The sum over rows of dyᵀ x for dy [..., out] and x [..., in]: [out, in].

    Transposes the narrower operand, which is often only a rank wide. The axes of rows are not merged: the mesh cuts
    each of them, and a merged axis could not be cut that way.
    """
    rows = tuple(range(x.ndim - 1))
    narrow, wide = (dy, x) if dy.shape[-1] <= x.shape[-1] else (x, dy)
    product = contract(as_stored(jnp.moveaxis(narrow, -1, 0)), wide, tuple(row + 1 for row in rows), rows)
    return product if narrow is dy else as_stored(product).T


def as_stored(x: jax.Array) -> jax.Array:
    """x, hidden from the compiler on a CPU, where it must not fold a transposition into a product.

    XLA's fast CPU kernels contract the last axis of their left operand. Only they have bfloat16 products with float32
    results. With a folded transposition the product is slow, or fails when it runs.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def contract(
    a: jax.Array, b: jax.Array, a_axes: tuple[int, ...], b_axes: tuple[int, ...], dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """Contract without transposing either operand: XLA's CPU and GPU kernels take the layouts as they are.

    Sums are float32, rounded to `dtype` once. Off the CPU, the sums of several devices are rounded, then added.
    """

    def product(a: jax.Array, b: jax.Array, result: jnp.dtype) -> jax.Array:
        axes = (a_axes, b_axes), ((), ())
        return jax.lax.dot_general(a, b, axes, precision=precision(a.dtype), preferred_element_type=result)

    # Matrix units round as they write. With a separate cast, XLA may write the float32 sums to memory first.
    return jax.lax.platform_dependent(
        a, b, cpu=lambda a, b: product(a, b, jnp.float32).astype(dtype), default=partial(product, result=dtype)
    )


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Keeps float32 products in float32 on every chip; by default GPUs and TPUs would round their operands."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _ready(weight: Weight, dtype: jnp.dtype, layout: Layout | None) -> jax.Array:
    """The gathered weight in `dtype`. It is gathered as codes, or in the narrower of its stored dtype and `dtype`."""
    if isinstance(weight, QTensor):
        if layout is not None:
            shardings = jax.tree.map(layout.sharding, weight.specs(layout.gathered, layout.mesh))
            weight = jax.lax.with_sharding_constraint(weight, shardings)
        return weight.dequantize(dtype)
    if layout is None:
        return weight.astype(dtype)
    narrow = weight.astype(dtype) if dtype.itemsize < weight.dtype.itemsize else weight
    return jax.lax.with_sharding_constraint(narrow, layout.sharding(layout.gathered)).astype(dtype)


class Linear(nnx.Module):
    """y = x Wᵀ + b, with x Wᵀ adapted if it has an adapter. `weight` is [..., out, in] as in Hugging Face and PEFT."""

    def __init__(self, weight: Weight, bias: jax.Array | None = None):
        self.weight = nnx.Param(weight)
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))
        self.adapter: LinearAdapter | None = nnx.data(None)
        self.layout: Layout | None = None

    def __call__(self, x: jax.Array, key: jax.Array | None = None, out_dtype: jnp.dtype | None = None) -> jax.Array:
        """x [..., in] -> [..., out] in x's dtype or `out_dtype`. `key` turns on the adapter's dropout."""
        y = self.product(x, out_dtype) if self.adapter is None else self.adapter(self, x, key, out_dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def product(self, x: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
        """x Wᵀ, without bias or adapter."""
        return matmul(x, self.weight.get_value(), self.layout, out_dtype)
