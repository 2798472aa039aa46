"""Weights in eight bits with their scales beside them: w = code * scale, in the ways of several tools.

* FP8 by blocks (DeepSeek, Qwen): `X.weight_scale_inv`, one scale to each `weight_block_size` of rows and columns.
  Despite its name it is multiplied.
* FP8 by tensor or by row (compressed-tensors, NVIDIA ModelOpt, FBGEMM): `X.weight_scale`, one value or `[out, 1]`.
* int8 by row (compressed-tensors `int-quantized`): the same with integer codes.

Scales of activations and of the key-value cache are for kernels that compute in 8 bits; they are left out.

Sources: `Fp8Dequantize` of transformers, `dequantize` of compressed-tensors.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from jaxft.hub.encoded import FLOATS, Encoded, Files, check_part, wrong_part

CODES = tuple(map(np.dtype, (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.int8)))
_SCALES = ("_scale_inv", "_scale")
_UNUSED = (
    *("input_scale", "input_scale_ub", "input_zero_point", "activation_scale", "output_scale"),
    *("q_scale", "k_scale", "v_scale"),
)
_FORMATS = ("float-quantized", "naive-quantized", "int-quantized")  # of compressed-tensors
_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")  # of ModelOpt


@dataclass(frozen=True, kw_only=True)
class Scaled(Encoded):
    """8-bit codes; `scales` is the name of what they are multiplied with, one value to each `block` [rows, columns]."""

    name: str
    scales: str
    block: tuple[int, int]

    def decode(self, begin: int, end: int, columns: slice) -> np.ndarray:
        codes = np.ascontiguousarray(self.files.read(self.name, (slice(begin, end), columns)))
        table = np.arange(256, dtype=np.uint8).view(codes.dtype).astype(np.float32)
        values = table[codes.view(np.uint8)]
        rows, width = self.block
        grid = self.files.read(self.scales).reshape(-(-self.shape[0] // rows), -1)
        scales = grid[np.arange(begin, end) // rows].astype(np.float32)
        values *= scales[:, np.arange(columns.start, columns.stop) // width]
        return values


def find(files: Files, settings: dict[str, Any]) -> dict[str, Encoded]:
    """The 8-bit weights of `files`, by name.

    Raises:
        SafetensorsError: a scale is missing or does not fit.
        ValueError: `settings`, the config's `quantization_config`, name a format that is not one of these.
    """
    if settings["quant_method"] == "compressed-tensors" and settings.get("format") not in _FORMATS:
        raise ValueError(
            f"{files.directory}: compressed-tensors format {settings.get('format')!r} is not supported; "
            f"supported: {', '.join(_FORMATS)}"
        )
    if settings["quant_method"] == "modelopt" and settings.get("quant_algo") not in _ALGORITHMS:
        raise ValueError(
            f"{files.directory}: ModelOpt's quant_algo {settings.get('quant_algo')!r} is not supported; "
            f"supported: {', '.join(_ALGORITHMS)}"
        )
    block = _block_size(settings)
    return {
        name: _scaled(files, name, block)
        for name in files.names()
        if name.endswith(".weight") and files.info(name).dtype in CODES
    }


def _block_size(settings: dict[str, Any]) -> tuple[int, int] | None:
    default = [128, 128] if settings["quant_method"] == "fp8" else None
    declared = settings.get("weight_block_size", default)
    for group in settings.get("config_groups", {}).values():
        declared = declared or (group.get("weights") or {}).get("block_structure")
    if declared is None:
        return None
    if not isinstance(declared, list) or len(declared) != 2 or not all(type(n) is int and n > 0 for n in declared):
        raise ValueError(f"config.json: the size of weight blocks is {declared!r}; it must be [rows, columns]")
    return declared[0], declared[1]


def _scaled(files: Files, name: str, declared: tuple[int, int] | None) -> Scaled:
    shape, module = files.info(name).shape, name.removesuffix(".weight")
    if len(shape) != 2:
        raise wrong_part(files, name, name, f"is of shape {shape}, expected [out, in]")
    scales = next((name + ending for ending in _SCALES if name + ending in files), name + _SCALES[-1])
    check_part(files, scales, of=name, dtypes=FLOATS)
    stored = files.info(scales).shape
    grid = stored if len(stored) == 2 else (prod(stored), 1)
    if grid == (1, 1):
        block = shape
    elif declared and grid == (-(-shape[0] // declared[0]), -(-shape[1] // declared[1])):
        block = declared
    elif grid == (shape[0], 1):
        block = (1, shape[1])
    else:
        blocks = f", one to a block of {list(declared)}" if declared else ""
        raise wrong_part(files, scales, name, f"is of shape {stored}; expected one scale, one to a row{blocks}")
    owners = [module]
    if module.endswith(("q_proj", "k_proj", "v_proj")):
        owners.append(module.rpartition(".")[0])  # scales of the cache may stand beside the projections
    unused = [f"{owner}.{unused}" for owner in owners for unused in _UNUSED]
    return Scaled(
        files=files,
        shape=shape,
        parts=(name, scales, *(part for part in unused if part in files)),
        name=name,
        scales=scales,
        block=block,
    )
