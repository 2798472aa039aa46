"""How each weight is cut over the mesh, by rules over parameter names.

Projections into the heads and the hidden layer are cut over `tensor` by rows, projections out of them by columns, so
that a block needs one reduction. `fsdp` cuts the storage further; the weight is gathered over it where it is used. The
experts of a layer are cut over `expert`, and each expert like any feed-forward.
A dimension must divide evenly, and a quantized one into whole blocks. So every kind of weight has several layouts in
order of preference, and the first that fits is taken.
"""

from dataclasses import dataclass

from jax.experimental import layout as device_layout
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from jaxft import rules

_TENSOR_FSDP = ("tensor", "fsdp")
_ROWS = ((_TENSOR_FSDP, None), ("tensor", "fsdp"))
_COLUMNS = (("fsdp", "tensor"), (None, _TENSOR_FSDP), *_ROWS)
_WHOLE = ()
_EXPERT_ROWS = tuple(("expert", *cut) for cut in (*_ROWS, ("tensor", None)))
_EXPERT_COLUMNS = tuple(("expert", *cut) for cut in (*_COLUMNS[:2], (None, "tensor"), (None, None)))

PREFERENCES = (
    (r"experts\.(gate|up|gate_up)_proj\.weight$", (*_EXPERT_ROWS, ("expert", None, None))),
    (r"experts\.down_proj\.weight$", _EXPERT_COLUMNS),
    (r"experts\..*\.bias$", (("expert", None),)),
    (r"(router|shared_expert_gate)\.(weight|bias)$|sinks$", _WHOLE),
    (r"(q|k|v|gate|up)_proj\.weight$", _ROWS),
    (r"(o|down)_proj\.weight$", _COLUMNS),
    (r"(embed_tokens|embed_positions)\.weight$", ((None, _TENSOR_FSDP), (None, "fsdp"), (None, "tensor"))),
    (r"lm_head\.weight$", (*_ROWS, (None, _TENSOR_FSDP))),
    (r"(q|k|v|gate|up)_proj\.bias$", (("tensor",),)),
    (r"(o|down)_proj\.bias$", _WHOLE),
    (r"norm\.(weight|bias)$", _WHOLE),
)


@dataclass(frozen=True)
class Layout:
    """How a weight is cut: `stored` between steps, `gathered` where it is used. Neither includes a layer axis."""

    mesh: Mesh
    stored: P

    @property
    def gathered(self) -> P:
        return P(*(_without_fsdp(axes) for axes in self.stored))

    def sharding(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def stacked(self, ndim: int) -> NamedSharding:
        """The stored sharding for an array with `ndim` axes: leading stack axes are not cut."""
        return NamedSharding(self.mesh, P(*(None,) * (ndim - len(self.stored)), *self.stored))


def layout_of(name: str, shape: tuple[int, ...], mesh: Mesh, block: int = 1) -> Layout:
    """The first preferred layout whose cuts divide the shape.

    Args:
        name: dotted parameter name, without layer numbers.
        shape: without the layer axis.
        mesh: with the axes of `jaxft.sharding.mesh.AXES`.
        block: columns in one block of a quantized weight.
    """
    preferences = rules.assign(PREFERENCES, [name], may_be_idle=True)[name]
    together = [1] * len(shape)
    if "experts.gate_up_proj" in name:
        together[1] = 2  # rows of gate and up alternate
    if name.endswith("weight"):
        together[-1] *= block
    for spec in preferences:
        if all(_divides(shape[axis], ways(mesh, axes), together[axis]) for axis, axes in enumerate(spec)):
            return Layout(mesh, P(*spec))
    return Layout(mesh, P(*(None,) * len(shape)))


TRANSPOSED_ON = {"tpu"}
"""Platforms that store 4-bit codes [..., out, in] column by column."""


def in_memory(sharding: Sharding, ndim: int) -> Sharding | device_layout.Format:
    """The memory layout of 4-bit codes with `ndim` axes on the sharding's devices.

    Each scale is repeated over a block of columns, which costs a TPU nothing if columns do not lie along its lanes. So
    XLA wants the codes transposed. They are stored that way from the start: otherwise XLA would copy all codes of the
    model at the beginning of every step.
    """
    if next(iter(sharding.device_set)).platform not in TRANSPOSED_ON:
        return sharding
    by_columns = device_layout.Layout(major_to_minor=(*range(ndim - 2), ndim - 1, ndim - 2))
    return device_layout.Format(by_columns, sharding)


def _divides(size: int, parts: int, block: int) -> bool:
    return parts == 1 or size % (parts * block) == 0


def ways(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """Into how many parts the given mesh axes cut a dimension."""
    if axes is None:
        return 1
    total = 1
    for axis in (axes,) if isinstance(axes, str) else axes:
        total *= mesh.shape[axis]
    return total


def names_of(spec: P, axis: int) -> tuple[str, ...]:
    """The mesh axes that an axis of an array is cut over."""
    names = spec[axis] if axis < len(spec) else None
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def over_fsdp_too(mesh: Mesh, axes: str | tuple[str, ...] | None, size: int) -> str | tuple[str, ...] | None:
    """The axes with `fsdp` appended, if a dimension of this size divides by all of them."""
    wider = (*names_of(P(axes), 0), "fsdp")
    return axes if "fsdp" in wider[:-1] or size % ways(mesh, wider) else wider


def _without_fsdp(axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    if isinstance(axes, tuple):
        return tuple(axis for axis in axes if axis != "fsdp") or None
    return None if axes == "fsdp" else axes
