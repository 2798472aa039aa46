"""Keeps the codes of a quantized checkpoint unchanged if the file already has the requested format.

bitsandbytes' NF4 in blocks of 64 that end where rows do, and its LLM.int8(), are jaxft's NF4 and Int8 bit for bit.
Anything else is dequantized, and quantized anew if asked.

Codes stay whatever becomes of their scales. Where the file has them in 8 bits and f32 is asked for, they are decoded,
exactly: the weights are the same. Where it has f32 and 8 bits are asked for, they are encoded, which gives what
double quantization of the original weights would have given.
"""

import logging
from collections.abc import Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxft.hub.bnb import EightBit, FourBit
from jaxft.hub.encoded import Encoded
from jaxft.hub.prequantized import Prequantized, Weights
from jaxft.quantization import nested
from jaxft.quantization.integer import Int8
from jaxft.quantization.nf4 import LEVELS, NF4
from jaxft.quantization.qtensor import Format, QTensor

logger = logging.getLogger(__name__)

_NESTED_BLOCK = 256


def keeps(weights: Weights, name: str, form: Format | None) -> bool:
    """Whether the file has the weight `name` in the codes of `form`."""
    weight = weights.encoded.get(name) if isinstance(weights, Prequantized) else None
    return weight is not None and form is not None and _is_form(weight, form)


def kept(weights: Weights, name: str, form: Format | None, sharding: NamedSharding | None) -> QTensor | None:
    """The weight `name` in the codes of the file, placed as `form` would have it; None: they are of another format.

    4-bit codes stay as they are packed, two to a byte [out, in / 2], but with the first in the lower half, as XLA has
    them: `jaxft.hub.stack.Storage.encode` takes them so. With a sharding, that of the weight, each device gets its
    own part.
    """
    if not keeps(weights, name, form):
        return None
    weight = weights.encoded[name]
    per_byte, read = (2, weight.pairs) if isinstance(weight, FourBit) else (1, weight.codes)
    rows, columns = weight.shape
    scales = _scales(weight, form)
    codes = jax.ShapeDtypeStruct((rows, columns // per_byte), jnp.uint8 if per_byte == 2 else jnp.int8)
    value = QTensor(codes, *scales, format=form)

    def part(leaf: jax.ShapeDtypeStruct | np.ndarray, cut: tuple[slice, ...]) -> np.ndarray:
        if leaf is not codes:
            return leaf[cut]
        (begin, end, _), (left, right, _) = (s.indices(n) for s, n in zip(cut, codes.shape, strict=True))
        return read(begin, end, slice(left * per_byte, right * per_byte))

    if sharding is None:
        return jax.tree.map(lambda leaf: jnp.asarray(part(leaf, (slice(None),) * leaf.ndim)), value)
    whole = QTensor(jax.ShapeDtypeStruct(weight.shape, codes.dtype), *scales, format=form)
    return jax.tree.map(
        lambda leaf, cut: jax.make_array_from_callback(
            leaf.shape, NamedSharding(sharding.mesh, cut), partial(part, leaf)
        ),
        value,
        whole.specs(sharding.spec, sharding.mesh),
    )


@cache
def say(text: str) -> None:
    """Log a warning, the same one once."""
    logger.warning(text)


def tell(weights: Weights, form: Format | None, dtype: str, quantized: Sequence[str]) -> None:
    """Log what happens to codes that are not kept, and to weights that the checkpoint left unquantized.

    Args:
        quantized: the weights that are in `form` afterwards.
    """
    if not isinstance(weights, Prequantized):
        return
    plain = [name for name in quantized if name not in weights.encoded or not weights.encoded[name].coded]
    if form is not None and plain:
        some = f"{', '.join(plain[:3])}{', ...' if len(plain) > 3 else ''}"
        say(
            f"{weights.directory}: {len(plain)} weights that this checkpoint keeps in full precision are quantized as "
            f"{form} with the others: {some}"
        )
    coded = [weight for weight in weights.encoded.values() if weight.coded]
    lost = [weight for weight in coded if form is None or not _is_form(weight, form)]
    if not lost:
        return
    now = f"dequantized to {dtype}" if form is None else f"dequantized, and those of the layers quantized as {form}"
    options = {option for weight in lost if (option := _option(weight))}
    hint = f"; {' or '.join(sorted(options))} keeps their codes" if options else ""
    say(f"{weights.directory}: {len(lost)} weights quantized by {weights.method} are {now}{hint}")


def _is_form(weight: Encoded, form: Format) -> bool:
    if isinstance(weight, EightBit):
        return isinstance(form, Int8)
    return isinstance(weight, FourBit) and isinstance(form, NF4) and _is_nf4(weight)


def _is_nf4(weight: FourBit) -> bool:
    """Whether its blocks and values are those of jaxft's NF4."""
    same = weight.kind == "nf4" and np.array_equal(weight.levels, LEVELS)
    return same and weight.blocksize == NF4.block_in and len(weight.shape) == 2 and not weight.shape[1] % NF4.block_in


def _option(weight: Encoded) -> str | None:
    """What a user sets to keep the codes."""
    if isinstance(weight, EightBit):
        return "load_in_8bit (quantization int8)"
    return "load_in_4bit (quantization nf4)" if isinstance(weight, FourBit) and _is_nf4(weight) else None


def _scales(weight: FourBit | EightBit, form: Format) -> tuple[np.ndarray, ...]:
    """The leaves of a `QTensor` after its codes."""
    if isinstance(weight, EightBit):
        return (weight.absmax()[:, None],)
    shape = (weight.shape[0], weight.shape[1] // NF4.block_in)
    inner = weight.nested
    if not form.double_quant:
        return (weight.absmax(0, shape[0] * shape[1]).reshape(shape),)
    if inner is not None and inner.blocksize == _NESTED_BLOCK and np.array_equal(inner.values, nested.dynamic_map()):
        return weight.absmax_codes().reshape(shape), inner.absmax, inner.offset
    encoded = nested.encode(jnp.asarray(weight.absmax(0, shape[0] * shape[1]).reshape(shape)))
    return tuple(map(np.asarray, encoded))
