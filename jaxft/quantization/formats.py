"""Formats by the names users write in a configuration."""

from jaxft.quantization.integer import Int4, Int8
from jaxft.quantization.nf4 import NF4
from jaxft.quantization.qtensor import Format


def parse_format(name: str, *, double_quant: bool = False, group_size: int | None = None) -> Format:
    """The format called "int8", "int4" or "nf4".

    Args:
      double_quant: store the scales in 8 bits; nf4 only.
      group_size: columns that share a scale; int4 only, 64 by default.

    Raises:
      ValueError: an unknown name, or an option that the format does not have.

    >>> parse_format("nf4", double_quant=True)
    NF4(double_quant=True)
    """
    if name not in ("int8", "int4", "nf4"):
        raise ValueError(f"unknown quantization format {name!r}; choose int8, int4 or nf4")
    if double_quant and name != "nf4":
        raise ValueError(f"double_quant compresses the scales of nf4; {name} has none to spare, leave it out")
    if group_size is not None and name != "int4":
        raise ValueError(f"group_size is an option of int4; the blocks of {name} are fixed, leave it out")
    if name == "int8":
        return Int8()
    if name == "int4":
        return Int4() if group_size is None else Int4(group_size)
    return NF4(double_quant)
