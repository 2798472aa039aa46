"""How many parameters a model has, in which format, and how many bytes they take."""

from typing import NamedTuple

from flax import nnx

from jaxft.models.linear import Adapter
from jaxft.quantization.qtensor import QTensor


class ParameterCount(NamedTuple):
    """Parameters stored in one way, as in ("nf4", 106_168_320, 59_719_680, False)."""

    format: str
    count: int
    bytes: int
    trained: bool


def count_parameters(model: nnx.Module, trained_type: type[nnx.Variable]) -> list[ParameterCount]:
    """One entry for each storage format, trained or frozen, largest first; also works on models without arrays."""
    totals: dict[tuple[str, bool], list[int]] = {}
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Param | Adapter):
            value = node.get_value()
            if isinstance(value, QTensor):
                kind, size, stored = type(value.format).__name__.lower(), value.codes.size, value.nbytes
            else:
                kind, size, stored = str(value.dtype), value.size, value.size * value.dtype.itemsize
            entry = totals.setdefault((kind, isinstance(node, trained_type)), [0, 0])
            entry[0] += size
            entry[1] += stored
    counts = [ParameterCount(kind, *sums, trained) for (kind, trained), sums in totals.items()]
    return sorted(counts, key=lambda entry: -entry.bytes)
