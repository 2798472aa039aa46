"""AWQ and GPTQ: integer codes packed into 32-bit words; w = (code - zero) * scale, with a scale and a zero to a group.

Both keep the weight as `[in, out]`. GPTQ packs codes along `in` and zeros along `out`, low bits first; an input may
be of any group, as `g_idx` says. AWQ packs both along `out`, and eight columns of a word in the order 0 2 4 6 1 3 5 7.

GPTQ's first format stores each zero less one (`checkpoint_format` gptq), the second (gptq_v2) as it is. The one is
taken from, and given back to, whole words, so that a zero of 0 borrows from its neighbour and pays back.

Sources: `QuantLinear` of AutoGPTQ and `WQLinear_GEMM` of AutoAWQ, whose kernels compute this in float16.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxft.hub.encoded import FLOATS, Encoded, Files, check_part, wrong_part

_AWQ_BITS = 4
_AWQ_SHIFTS = 4 * np.array([0, 4, 1, 5, 2, 6, 3, 7])  # of columns 0 to 7
_GPTQ_BITS = (2, 4, 8)
_GPTQ_ZEROS = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True, kw_only=True)
class Packed(Encoded):
    """A weight `[out, in]`; `module` is what its tensors are named after."""

    module: str

    def part(self, name: str, out: slice, rows: slice = slice(None)) -> np.ndarray:
        return np.ascontiguousarray(self.files.read(f"{self.module}.{name}", (rows, out)))


@dataclass(frozen=True, kw_only=True)
class Awq(Packed):
    group_size: int

    def decode(self, begin: int, end: int, columns: slice) -> np.ndarray:
        words = slice(begin // 8, -(-end // 8))
        packed = self.part("qweight", words, columns), self.part("qzeros", words)
        inside = slice(begin % 8, begin % 8 + end - begin)
        codes, zeros = (_unpack(part, _AWQ_SHIFTS, _AWQ_BITS)[:, inside] for part in packed)
        groups = np.arange(columns.start, columns.stop) // self.group_size
        return _dequantize(codes, zeros, self.part("scales", slice(begin, end)), groups)


@dataclass(frozen=True, kw_only=True)
class Gptq(Packed):
    bits: int
    add_to_zeros: int
    groups: np.ndarray  # int [in]: the group of each input

    def decode(self, begin: int, end: int, columns: slice) -> np.ndarray:
        shifts = np.arange(0, 32, self.bits)
        per_word = len(shifts)
        packed = self.part("qweight", slice(begin, end), slice(columns.start // per_word, -(-columns.stop // per_word)))
        codes = _unpack(packed.T, shifts, self.bits).T
        codes = codes[columns.start % per_word :][: columns.stop - columns.start]
        words = slice(begin // per_word, -(-end // per_word))
        one_each = np.uint32(sum(self.add_to_zeros << shift for shift in range(0, 32, self.bits)))
        zeros = _unpack((self.part("qzeros", words).view(np.uint32) + one_each).view(np.int32), shifts, self.bits)
        zeros = zeros[:, begin % per_word :][:, : end - begin]
        return _dequantize(codes, zeros, self.part("scales", slice(begin, end)), self.groups[columns])


def _unpack(words: np.ndarray, shifts: np.ndarray, bits: int) -> np.ndarray:
    """int32 [n, m] to int16 [n, m * len(shifts)]."""
    words = words.view(np.uint32)[..., None]
    codes = np.empty((*words.shape[:-1], len(shifts)), np.int16)
    for position, shift in enumerate(shifts):
        codes[..., position] = words[..., 0] >> np.uint32(shift) & np.uint32(2**bits - 1)
    return codes.reshape(len(words), -1)


def _dequantize(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[in, out] and, by group, [groups, out] to f32 [out, in]."""
    values = (codes - zeros[groups]).astype(np.float32)
    values *= scales.astype(np.float32)[groups]
    return values.T


def find_awq(files: Files, settings: dict[str, Any]) -> dict[str, Encoded]:
    """The weights that AWQ packed, by name.

    Raises:
        SafetensorsError: a part of a weight is missing or does not fit the others.
        ValueError: `settings`, the config's `quantization_config`, ask for another packing or width.
    """
    packing = settings.get("version") or settings.get("format") or "gemm"
    if str(packing).lower() != "gemm" or settings.get("bits") != _AWQ_BITS:
        raise ValueError(
            f"{files.directory}: AWQ version {packing!r} with {settings.get('bits')!r} bits is not supported; "
            f"supported: gemm with {_AWQ_BITS} bits"
        )
    found: dict[str, Encoded] = {}
    for module, name in _modules(files):
        width, words = files.info(f"{module}.qweight").shape
        group_size = _group_size(files, settings, width)
        groups = -(-width // group_size)
        check_part(files, f"{module}.qzeros", of=name, dtypes=["int32"], shape=(groups, words))
        check_part(files, f"{module}.scales", of=name, dtypes=FLOATS, shape=(groups, words * 8))
        parts = tuple(f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
        found[name] = Awq(files=files, shape=(words * 8, width), parts=parts, module=module, group_size=group_size)
    return found


def find_gptq(files: Files, settings: dict[str, Any]) -> dict[str, Encoded]:
    """The weights that GPTQ packed, by name. Raises as `find_awq`."""
    bits = settings.get("bits")
    version = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if bits not in _GPTQ_BITS or version not in _GPTQ_ZEROS:
        raise ValueError(
            f"{files.directory}: GPTQ checkpoint_format {version!r} with {bits!r} bits is not supported; "
            f"supported: {' and '.join(_GPTQ_ZEROS)} with {', '.join(map(str, _GPTQ_BITS))} bits"
        )
    found: dict[str, Encoded] = {}
    for module, name in _modules(files):
        words, out = files.info(f"{module}.qweight").shape
        width = words * (32 // bits)
        group_size = _group_size(files, settings, width)
        count = -(-width // group_size)
        check_part(files, f"{module}.qzeros", of=name, dtypes=["int32"], shape=(count, -(-out * bits // 32)))
        check_part(files, f"{module}.scales", of=name, dtypes=FLOATS, shape=(count, out))
        parts = [f"{module}.{part}" for part in ("qweight", "qzeros", "scales")]
        groups = np.arange(width, dtype=np.int32) // group_size
        if (order := f"{module}.g_idx") in files:
            check_part(files, order, of=name, dtypes=["int32", "int64"], shape=(width,))
            groups = files.read(order).astype(np.int32)
            if groups.min() < 0 or groups.max() >= count:
                raise wrong_part(files, order, name, f"names groups {groups.min()} to {groups.max()} of {count}")
            parts.append(order)
        found[name] = Gptq(
            files=files,
            shape=(out, width),
            parts=tuple(parts),
            module=module,
            bits=bits,
            add_to_zeros=_GPTQ_ZEROS[version],
            groups=groups,
        )
    return found


def _modules(files: Files) -> list[tuple[str, str]]:
    """(module, name of its weight) of all that is packed."""
    modules = [name.removesuffix(".qweight") for name in files.names() if name.endswith(".qweight")]
    for module in modules:
        name = f"{module}.qweight"
        check_part(files, name, of=f"{module}.weight", dtypes=["int32"])
        if len(shape := files.info(name).shape) != 2:
            raise wrong_part(files, name, f"{module}.weight", f"is of shape {shape}, expected a matrix")
    return [(module, f"{module}.weight") for module in modules]


def _group_size(files: Files, settings: dict[str, Any], width: int) -> int:
    declared = settings.get("group_size")
    if declared == -1:
        return width
    if type(declared) is not int or declared < 1:
        raise ValueError(f"{files.directory}: group_size of the quantization_config is {declared!r}")
    return declared
