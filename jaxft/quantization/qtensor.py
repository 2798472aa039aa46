"""A frozen weight in few bits, as one pytree leaf group that goes wherever an array goes.

Codes keep the shape of the weight they stand for, `[..., out, in]`, whatever their width: leading axes are
stacks (layers, experts), so `lax.scan` and `vmap` slice a stack of quantized weights as they slice arrays,
and a rule over the weight's axes is a rule over the codes' axes. Scales belong to blocks along `in`. The static
`format` defines what the codes mean; see `integer` and `nf4`.
"""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


class Format(Protocol):
    """A codec: a small hashable value that turns weights into a `QTensor` and back."""

    @property
    def block_in(self) -> int:
        """Columns of the weight in one block: shards of `in` that are multiples of it hold whole blocks."""
        ...

    def encode(self, w: jax.Array) -> "QTensor":
        """Floating point `[..., out, in]` to codes and scales, computed in f32; each matrix separately."""
        ...

    def decode(self, q: "QTensor") -> jax.Array:
        """The f32 weight `[..., out, in]` that the codes stand for."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized weight of logical shape `[..., out, in]`.

    Invariants (of arrays; leaves may as well be tracers, shapes, shardings or specs, so construction checks
    nothing):
      codes          integers `[..., out, in]`, in the format's own dtype.
      scales         `[..., out, n]` with n blocks to a row, the last one short where `in` is no multiple of
                     `format.block_in`; n = 1 where a row is one block. f32, or uint8 codes when nested.
      nested_absmax  None, or f32 `[..., ceil(out * n / 256)]`: the scales of the scales, over the flattened
                     scales of each matrix.
      nested_offset  None, or f32 `[...]`: the mean of each matrix's scales. None exactly when nested_absmax is.
    Every leaf has the leading axes of the weight, so slicing a stack slices all leaves alike.
    """

    codes: jax.Array
    scales: jax.Array
    nested_absmax: jax.Array | None = None
    nested_offset: jax.Array | None = None
    format: Format = dataclasses.field(metadata={"static": True}, kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logical weight, `[..., out, in]`."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def nbytes(self) -> int:
        """Bytes held by all leaves, a 4-bit code counting half a byte (as stored; its `itemsize` says 1)."""
        return sum(_nbytes(leaf) for leaf in jax.tree.leaves(self))

    def dequantize(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The weight `[..., out, in]`, computed in f32 and rounded to `dtype` once."""
        return self.format.decode(self).astype(dtype)

    def specs(self, spec: PartitionSpec, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> "QTensor":
        """The `PartitionSpec` of each leaf when the logical weight is sharded by `spec` over `mesh`.

        Codes take `spec` unchanged. Scales take it too. But if shards along `in` would not hold whole blocks,
        every device has the scales of the whole row. Nested scales follow the stack axes alone.
        """
        *stack, out, inner = (*spec, *[None] * (self.ndim - len(spec)))
        names = () if inner is None else (inner,) if isinstance(inner, str) else inner
        shards = math.prod(mesh.shape[name] for name in names)
        whole = self.shape[-1] % (shards * self.format.block_in) == 0 and self.scales.shape[-1] % shards == 0
        return dataclasses.replace(
            self,
            codes=spec,
            scales=PartitionSpec(*stack, out, inner if whole else None),
            nested_absmax=None if self.nested_absmax is None else PartitionSpec(*stack, None),
            nested_offset=None if self.nested_offset is None else PartitionSpec(*stack),
        )


def quantize(w: jax.Array, format: Format) -> QTensor:
    """Quantizes a weight, or a stack of weights, `[..., out, in]` of f32, bf16 or f16.

    Pure and jittable with `format` static. The result for a stack is exactly the stack of the matrices' results.

    Raises:
      ValueError: `w` has fewer than two axes or is not floating point.

    >>> from jaxft.quantization.nf4 import NF4
    >>> q = quantize(jnp.linspace(-1.0, 1.0, 256).reshape(2, 128), NF4())
    >>> q.codes.dtype, q.scales.shape, q.dequantize(jnp.bfloat16).shape
    (dtype(uint4), (2, 2), (2, 128))
    """
    if w.ndim < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(
            f"only floating point weights [..., out, in] can be quantized, got {w.dtype}{list(w.shape)}; "
            "keep norms, biases and integer tables out of the quantization rules"
        )
    return format.encode(w)


def _nbytes(leaf: jax.Array | jax.ShapeDtypeStruct) -> int:
    info = jnp.iinfo if jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.finfo
    return -(-leaf.size * info(leaf.dtype).bits // 8)
