"""Experts in MXFP4, as gpt-oss comes: 4-bit floats, 32 of which share a power of two.

`X_blocks` uint8 `[experts, out, in / 32, 16]` holds two codes to a byte, the first in the low half; `X_scales` uint8
`[experts, out, in / 32]` the exponents, with a bias of 127. The weight `X` is `[experts, in, out]`: transformers' own
gpt-oss multiplies from the left.

Source: OCP Microscaling Formats, version 1.0, sections 5.3.3 and 5.4.1; `convert_moe_packed_tensors` of transformers.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jaxft.hub.encoded import Encoded, Files, check_part, wrong_part

_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_LEVELS = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
_PAIRS = np.stack([np.tile(_LEVELS, 16), np.repeat(_LEVELS, 16)], axis=-1)
_POWERS = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))  # 255 means NaN
_GROUP = 32
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Microscaled(Encoded):
    """Experts; every value is exact in bfloat16."""

    dtype: np.dtype = _BFLOAT16

    def decode(self, begin: int, end: int, columns: slice) -> np.ndarray:
        blocks, scales = (self.files.read(part, (slice(begin, end), columns)) for part in self.parts)
        values = _PAIRS[blocks].reshape(*scales.shape, _GROUP)
        values *= _POWERS[scales][..., None]
        return values.astype(self.dtype).reshape(*scales.shape[:2], -1).swapaxes(1, 2)


def find(files: Files, settings: dict[str, Any]) -> dict[str, Encoded]:
    """The experts of `files`, by name. The files say all there is to know; `settings` are not needed.

    Raises:
        SafetensorsError: blocks without scales, or of another shape than theirs.
    """
    found: dict[str, Encoded] = {}
    for blocks in files.names():
        if not blocks.endswith("_blocks"):
            continue
        name = blocks.removesuffix("_blocks")
        check_part(files, blocks, of=name, dtypes=["uint8"])
        shape = files.info(blocks).shape
        if len(shape) != 4 or shape[3] != _GROUP // 2:
            raise wrong_part(files, blocks, name, f"is of shape {shape}, expected [experts, out, in / 32, 16]")
        check_part(files, f"{name}_scales", of=name, dtypes=["uint8"], shape=shape[:3])
        experts, out, groups, _ = shape
        shown = (experts, groups * _GROUP, out)
        found[name] = Microscaled(files=files, shape=shown, parts=(blocks, f"{name}_scales"))
    return found
