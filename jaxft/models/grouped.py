"""Multiply each row with the weights of its expert; no row is dropped or computed twice.

Rows are sorted by expert, so that the rows of an expert are contiguous. TPUs have an operation for that. Elsewhere XLA
would multiply all rows with all experts; here a loop visits the experts that have rows, dequantizes one at a time
and takes its rows in tiles.

As in `linear.matmul`, the backward pass starts again from the stored weight, quantized and sharded.

Axes: M rows, E experts. Under `shard_map` E are the experts of one device, and M the rows that it sees; rows of
other devices' experts come last, and their products are zero.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxft.models.linear import Weight, as_stored, contract, precision
from jaxft.quantization.qtensor import QTensor

TILE = 128
"""Most rows multiplied at a time."""


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(x: jax.Array, weight: Weight, sizes: jax.Array, stored: Weight | None = None) -> jax.Array:
    """Row m of x [M, in] times weight[e] [out, in] of its expert, transposed: [M, out], accumulated in float32.

    Args:
        x: sorted by expert; its dtype is the dtype of the operands.
        weight: [E, out, in], an array, or a `QTensor`, which has no gradient.
        sizes: [E] int32, the rows of each expert. Rows beyond their sum give zeros.
        stored: how the weight is sharded, if this runs under `shard_map`: a `PartitionSpec` for each of its leaves.
    """
    return _products(x, _gathered(weight, stored), sizes, 1)


def _forward(x, weight, sizes, stored):
    return grouped_matmul(x, weight, sizes, stored), (x, weight, sizes)


def _backward(stored, residuals, dy):
    x, weight, sizes = residuals
    dx = _products(dy.astype(x.dtype), _gathered(weight, stored), sizes, 0)
    if isinstance(weight, QTensor):
        return dx, None, None
    d_weight = _outer_products(dy.astype(x.dtype), x, sizes)
    for axis in _fsdp_axes(stored):
        d_weight = jax.lax.psum_scatter(d_weight, "fsdp", scatter_dimension=axis, tiled=True)
    return dx, d_weight.astype(weight.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _gathered(weight: Weight, stored: Weight | None) -> Weight:
    """The weights of this device's experts, gathered over fsdp; codes are gathered as codes."""

    def gather(leaf: jax.Array, spec: P) -> jax.Array:
        for axis in _fsdp_axes(spec):
            leaf = jax.lax.all_gather(leaf, "fsdp", axis=axis, tiled=True)
        return leaf

    return weight if stored is None else jax.tree.map(gather, weight, stored)


def _fsdp_axes(spec: P | None) -> list[int]:
    return [axis for axis, cut in enumerate(spec or ()) if cut == "fsdp" or (isinstance(cut, tuple) and "fsdp" in cut)]


def _products(x: jax.Array, weight: Weight, sizes: jax.Array, axis: int) -> jax.Array:
    """x [M, .] times its expert's matrix, contracted over the given axis of the matrix: [M, ..] in x's dtype."""
    y = jax.lax.platform_dependent(
        x, weight, sizes, tpu=partial(_ragged, axis=axis), default=partial(_looped, axis=axis)
    )
    return jnp.where((jnp.arange(x.shape[0]) < sizes.sum())[:, None], y, jnp.zeros((), y.dtype))


def _ragged(x: jax.Array, weight: Weight, sizes: jax.Array, axis: int) -> jax.Array:
    # One expert's codes at a time: for all at once, XLA writes scales and products to memory in float32.
    dense = (
        jax.lax.map(partial(_dense, dtype=x.dtype), weight) if isinstance(weight, QTensor) else _dense(weight, x.dtype)
    )
    numbers = jax.lax.RaggedDotDimensionNumbers((((1,), (axis + 1,)), ((), ())), (0,), (0,))
    return _ragged_dot(x, dense, sizes, numbers, x.dtype)


def _looped(x: jax.Array, weight: Weight, sizes: jax.Array, axis: int) -> jax.Array:
    def product(e: jax.Array) -> Callable[[jax.Array], jax.Array]:
        one = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, e, 0, keepdims=False), weight)
        one = _dense(one, x.dtype)
        return lambda rows: contract(rows, one, (1,), (axis,), x.dtype)

    tile = _tile(x.shape[0], sizes.shape[0])
    rows = jnp.pad(x, ((0, tile), (0, 0)))

    def visit(e: jax.Array, start: jax.Array, y: jax.Array) -> jax.Array:
        multiply = product(e)

        def one_tile(t: jax.Array, y: jax.Array) -> jax.Array:
            # The last tile of an expert may run into rows of the next expert, which are written later.
            at = start + t * tile
            return jax.lax.dynamic_update_slice_in_dim(y, multiply(jax.lax.dynamic_slice_in_dim(rows, at, tile)), at, 0)

        return jax.lax.fori_loop(0, -(-sizes[e] // tile), one_tile, y)

    width = weight.shape[2 - axis]
    return _for_busy_experts(sizes, visit, jnp.zeros((x.shape[0] + tile, width), x.dtype))[: x.shape[0]]


def _outer_products(dy: jax.Array, x: jax.Array, sizes: jax.Array) -> jax.Array:
    """The sum of dyᵀ x over the rows of each expert, for dy [M, out] and x [M, in]: [E, out, in] float32."""
    return jax.lax.platform_dependent(dy, x, sizes, tpu=_ragged_outer, default=_looped_outer)


def _ragged_outer(dy: jax.Array, x: jax.Array, sizes: jax.Array) -> jax.Array:
    return _ragged_dot(dy, x, sizes, jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ()), jnp.float32)


def _looped_outer(dy: jax.Array, x: jax.Array, sizes: jax.Array) -> jax.Array:
    tile = _tile(x.shape[0], sizes.shape[0])
    dy, x = (jnp.pad(rows, ((0, tile), (0, 0))) for rows in (dy, x))
    narrow_dy = dy.shape[1] <= x.shape[1]

    def visit(e: jax.Array, start: jax.Array, sums: jax.Array) -> jax.Array:
        def one_tile(t: jax.Array, total: jax.Array) -> jax.Array:
            at = start + t * tile
            one_dy, one_x = (jax.lax.dynamic_slice_in_dim(rows, at, tile) for rows in (dy, x))
            own = (t * tile + jnp.arange(tile) < sizes[e])[:, None]
            one_dy = jnp.where(own, one_dy, jnp.zeros((), dy.dtype))
            narrow, wide = (one_dy, one_x) if narrow_dy else (one_x, one_dy)
            return total + contract(as_stored(narrow.T), wide, (1,), (0,))

        shape = sums.shape[1:] if narrow_dy else sums.shape[:0:-1]
        total = jax.lax.fori_loop(0, -(-sizes[e] // tile), one_tile, jnp.zeros(shape, jnp.float32))
        return jax.lax.dynamic_update_index_in_dim(sums, total if narrow_dy else total.T, e, 0)

    return _for_busy_experts(sizes, visit, jnp.zeros((sizes.shape[0], dy.shape[1], x.shape[1]), jnp.float32))


def _for_busy_experts(sizes: jax.Array, visit: Callable, carry: jax.Array) -> jax.Array:
    """carry = visit(expert, its first row, carry) for the experts that have rows, in order."""
    starts = jnp.cumsum(sizes) - sizes
    busy = jnp.argsort(sizes == 0, stable=True)
    return jax.lax.fori_loop(0, jnp.sum(sizes > 0), lambda i, c: visit(busy[i], starts[busy[i]], c), carry)


def _tile(rows: int, experts: int) -> int:
    """Half of an expert's mean rows, as a power of two: a tile that is not full costs as much as a full one."""
    return max(8, min(TILE, 1 << (rows // (2 * experts)).bit_length()))


def _ragged_dot(
    a: jax.Array, b: jax.Array, sizes: jax.Array, numbers: jax.lax.RaggedDotDimensionNumbers, dtype: jnp.dtype
) -> jax.Array:
    return jax.lax.ragged_dot_general(a, b, sizes, numbers, precision=precision(a.dtype), preferred_element_type=dtype)


def _dense(weight: Weight, dtype: jnp.dtype) -> jax.Array:
    return weight.dequantize(dtype) if isinstance(weight, QTensor) else weight.astype(dtype)
