"""Weights as bitsandbytes writes them: NF4 and FP4 in blocks, and LLM.int8() by rows.

4 bits: beside `X.weight`, the packed codes, stand `.absmax`, `.quant_map` (the sixteen values) and a JSON text as
bytes, `.quant_state.bitsandbytes__nf4`. Codes lie row-major, the first of each two in the high half of a byte, and
blocks run on from one row into the next. With double quantization absmax itself is codes, indices into
`.nested_quant_map`, in blocks of which each has a scale in `.nested_absmax`; their mean is in the JSON.

8 bits: `X.weight` is int8 `[out, in]` and `X.SCB` the absmax of each row; w = code * SCB / 127.

Source: `QuantState.as_dict` and `dequantize_4bit` of bitsandbytes.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from jaxft.hub.encoded import FLOATS, Encoded, Files, check_part, wrong_part
from jaxft.hub.safetensors import SafetensorsError, strict_json

_PART = re.compile(
    r"(?P<weight>.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(?P<type>\w+))"
)
_TYPES = ("nf4", "fp4")


@dataclass(frozen=True, kw_only=True)
class Nested:
    """Scales of scales: absmax = values[code] * absmax[i // blocksize] + offset."""

    values: np.ndarray  # f32 [256]
    absmax: np.ndarray  # f32
    blocksize: int
    offset: np.float32


_SWAPPED = np.array([byte >> 4 | byte % 16 << 4 for byte in range(256)], np.uint8)
"""A byte with its halves exchanged."""


@dataclass(frozen=True, kw_only=True)
class FourBit(Encoded):
    """A weight in sixteen values, `levels`, with one scale to `blocksize` of them."""

    name: str
    kind: str  # nf4 or fp4
    levels: np.ndarray  # f32 [16]
    blocksize: int
    nested: Nested | None

    def decode(self, begin: int, end: int, columns: slice) -> np.ndarray:
        pairs = np.stack([np.repeat(self.levels, 16), np.tile(self.levels, 16)], axis=-1)
        values = self._unpack(pairs, begin, end, columns)
        lines, width = values.reshape(-1, values.shape[-1]), self.shape[-1]
        first = begin * prod(self.shape[1:-1]) * width + columns.start  # the place of the first value in the whole
        last = first + (len(lines) - 1) * width + lines.shape[1]
        block = first // self.blocksize
        absmax = self.absmax(block, -(-last // self.blocksize))
        if lines.shape[1] == width:
            lines *= np.repeat(absmax, self.blocksize)[first % self.blocksize :][: lines.size].reshape(lines.shape)
        else:
            places = np.arange(len(lines))[:, None] * width + np.arange(lines.shape[1])
            lines *= absmax[(places + first % self.blocksize) // self.blocksize]
        return values

    def codes(self, begin: int, end: int, columns: slice) -> np.ndarray:
        """The indices into `levels` of these rows and columns, uint8."""
        both = np.arange(256, dtype=np.uint8)
        return self._unpack(np.stack([both >> 4, both & 15], axis=-1), begin, end, columns)

    def pairs(self, begin: int, end: int, columns: slice) -> np.ndarray:
        """The same two to a byte, the first in the lower half; width, begin and end of the columns are even."""
        packed = self.files.read(self.name).view(np.uint8).reshape(self.shape[0], -1)
        return _SWAPPED[packed[begin:end, columns.start // 2 : columns.stop // 2]]

    def _unpack(self, pairs: np.ndarray, begin: int, end: int, columns: slice) -> np.ndarray:
        """The first and second value that `pairs` [256, 2] has for each byte, contiguous."""
        width, count = self.shape[-1], columns.stop - columns.start
        lines = prod(self.shape[1:-1])
        packed = self.files.read(self.name).reshape(-1).view(np.uint8)
        first, last = begin * lines * width, end * lines * width
        if width % 2:  # rows begin inside of bytes
            values = pairs[packed[first // 2 : -(-last // 2)]].reshape(-1)[first % 2 :][: last - first]
            values = values.reshape(-1, width)[:, columns]
        else:
            part = packed[first // 2 : last // 2].reshape(-1, width // 2)[:, columns.start // 2 : -(-columns.stop // 2)]
            values = pairs[part].reshape(len(part), -1)[:, columns.start % 2 :][:, :count]
        return np.ascontiguousarray(values).reshape(end - begin, *self.shape[1:-1], count)

    def absmax(self, begin: int, end: int) -> np.ndarray:
        """The scales of the blocks `begin` to `end`, f32."""
        stored = self.absmax_codes()[begin:end]
        if self.nested is None:
            return stored.astype(np.float32)
        scales = self.nested.absmax[np.arange(begin, end) // self.nested.blocksize]
        return self.nested.values[stored] * scales + self.nested.offset

    def absmax_codes(self) -> np.ndarray:
        """The scales of all blocks as the file has them."""
        return self.files.read(f"{self.name}.absmax").reshape(-1)


@dataclass(frozen=True, kw_only=True)
class EightBit(Encoded):
    """A weight in int8, with one scale to a row."""

    name: str
    scales: str

    def decode(self, begin: int, end: int, columns: slice) -> np.ndarray:
        return self.codes(begin, end, columns) * self.absmax()[begin:end, None] * np.float32(1 / 127)

    def codes(self, begin: int, end: int, columns: slice) -> np.ndarray:
        return self.files.read(self.name, (slice(begin, end), columns))

    def absmax(self) -> np.ndarray:
        """Largest magnitude of each row, f32 [out]."""
        return self.files.read(self.scales).astype(np.float32)


def find(files: Files, settings: dict[str, Any]) -> dict[str, Encoded]:
    """The quantized weights of `files`, by name. The files say all there is to know; `settings` are not needed.

    Raises:
        SafetensorsError: a part of a weight is missing or does not fit the others.
    """
    parts: dict[str, list[str]] = defaultdict(list)
    for name in files.names():
        if match := _PART.fullmatch(name):
            parts[match["weight"]].append(name)
    found: dict[str, Encoded] = {weight: _four_bit(files, weight, names) for weight, names in parts.items()}
    for name in files.names():
        if name.endswith(".weight") and files.info(name).dtype == np.int8:
            found[name] = _eight_bit(files, name)
    return found


def _four_bit(files: Files, name: str, parts: list[str]) -> FourBit:
    states = [part for part in parts if ".quant_state." in part]
    if len(states) != 1:
        fault = "is missing" if not states else f"is there {len(states)} times"
        raise SafetensorsError(f"{files.directory}: {name}.quant_state.bitsandbytes__nf4 (or fp4) {fault}")
    check_part(files, states[0], of=name, dtypes=["uint8"])
    try:
        state = _parse_state(files.read(states[0]).tobytes())
    except SafetensorsError as error:
        raise wrong_part(files, states[0], name, f"is damaged: {error}") from None
    shape, blocksize = tuple(state["shape"]), state["blocksize"]
    check_part(files, name, of=name, dtypes=["uint8", *FLOATS])
    if (found := files.info(name).nbytes) != (expected := -(-prod(shape) // 2)):
        raise wrong_part(files, name, name, f"has {found} bytes, but shape {shape} takes {expected}")
    check_part(files, f"{name}.quant_map", of=name, dtypes=["float32"], shape=(16,))
    blocks = -(-prod(shape) // blocksize)
    nested = None
    if "nested_blocksize" in state:
        check_part(files, f"{name}.absmax", of=name, dtypes=["uint8"], shape=(blocks,))
        groups = -(-blocks // state["nested_blocksize"])
        check_part(files, f"{name}.nested_absmax", of=name, dtypes=["float32"], shape=(groups,))
        check_part(files, f"{name}.nested_quant_map", of=name, dtypes=["float32"], shape=(256,))
        nested = Nested(
            values=files.read(f"{name}.nested_quant_map").copy(),
            absmax=files.read(f"{name}.nested_absmax").copy(),
            blocksize=state["nested_blocksize"],
            offset=np.float32(state["nested_offset"]),
        )
    else:
        check_part(files, f"{name}.absmax", of=name, dtypes=FLOATS, shape=(blocks,))
    return FourBit(
        files=files,
        shape=shape,
        parts=(name, *parts),
        name=name,
        kind=state["quant_type"],
        levels=files.read(f"{name}.quant_map").copy(),
        blocksize=blocksize,
        nested=nested,
    )


def _parse_state(text: bytes) -> dict[str, Any]:
    state = strict_json(text)
    checks = {
        "quant_type": lambda value: value in _TYPES,
        "blocksize": _is_natural,
        "shape": lambda value: isinstance(value, list) and len(value) > 1 and all(map(_is_natural, value)),
    }
    if {"nested_blocksize", "nested_offset"} & state.keys():
        checks |= {"nested_blocksize": _is_natural, "nested_offset": lambda value: isinstance(value, float)}
    for key, fits in checks.items():
        if key not in state:
            raise SafetensorsError(f"it has no {key}")
        if not fits(state[key]):
            raise SafetensorsError(f"its {key} is {state[key]!r:.99}")
    return state


def _is_natural(value: object) -> bool:
    return type(value) is int and value > 0


def _eight_bit(files: Files, name: str) -> EightBit:
    shape, module = files.info(name).shape, name.removesuffix(".weight")
    scales, layout = f"{module}.SCB", f"{module}.weight_format"
    if len(shape) != 2:
        raise wrong_part(files, name, name, f"is of shape {shape}, expected [out, in]")
    check_part(files, scales, of=name, dtypes=["float32"], shape=shape[:1])
    parts = [name, scales]
    if layout in files:
        if files.read(layout).any():  # 1 to 3 are the tiles of old GPU kernels
            raise wrong_part(files, layout, name, "is not 0 (rows); save the checkpoint again with bitsandbytes 0.45+")
        parts.append(layout)
    return EightBit(files=files, shape=shape, parts=tuple(parts), name=name, scales=scales)
