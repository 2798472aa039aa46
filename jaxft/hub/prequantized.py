"""Presents checkpoints that were published quantized as if they were not quantized.

`open_directory` gives what the loader reads: the files themselves, or `Prequantized`, where every weight has the name
and shape that the model knows and is dequantized as it is read, while its codes, scales and zeros are out of sight.
What a format leaves unexplained stays in sight, so a strict loader still refuses it. A weight whose codes jaxft
can compute with is taken over as it is; see `jaxft.hub.kept`.

A format is one function, from files and settings to the weights that it finds. Add one to METHODS.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.hub import bnb, float8, mxfp4, packed
from jaxft.hub.checkpoint import Checkpoint
from jaxft.hub.encoded import Encoded, Files
from jaxft.hub.safetensors import SafetensorsError, TensorInfo
from jaxft.hub.text_part import TextPart
from jaxft.models.families import TRANSPOSED
from jaxft.models.hf_config import WITH_VISION

METHODS: Mapping[str, Callable[[Files, dict[str, Any]], dict[str, Encoded]]] = {
    "awq": packed.find_awq,
    "bitsandbytes": bnb.find,
    "compressed-tensors": float8.find,
    "fbgemm_fp8": float8.find,
    "fp8": float8.find,
    "gptq": packed.find_gptq,
    "modelopt": float8.find,
    "mxfp4": mxfp4.find,
}
"""`quant_method` -> the function that finds its weights."""

_SIDECAR = "hf_quant_config.json"  # where ModelOpt writes what others write into config.json
_CHUNK = 4 << 20  # values decoded at a time


@dataclass(frozen=True, slots=True)
class DecodedInfo:
    """A weight as it is read; `nbytes` is what it takes in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    nbytes: int


class Prequantized:
    """The weights that `files` stand for. Reads like a `Checkpoint`, except that decoded weights are copies."""

    def __init__(self, files: Files, encoded: Mapping[str, Encoded], method: str):
        self.files = files
        self.directory = files.directory
        self.metadata = files.metadata
        self.encoded = encoded
        self.method = method
        owner = {part: name for name, weight in encoded.items() for part in weight.parts}
        for name, weight in encoded.items():
            if name in files and name not in weight.parts:
                raise SafetensorsError(f"{files.path(name)}: holds {name} itself besides {weight.parts[0]}; keep one")
        self._names = tuple(dict.fromkeys(owner.get(name, name) for name in files.names()))
        for name in self._names:
            if name.endswith(".weight") and name not in encoded and files.info(name).dtype.itemsize == 1:
                raise SafetensorsError(
                    f"{files.path(name)}: {name} is {files.info(name).dtype}, and nothing says how to decode it: "
                    f"its scales are missing, or it is of another format than {method}"
                )

    def names(self) -> tuple[str, ...]:
        """All names, shard by shard, in the order of their data."""
        return self._names

    def info(self, name: str) -> TensorInfo | DecodedInfo:
        if (weight := self.encoded.get(name)) is None:
            return self.files.info(name)
        return DecodedInfo(weight.dtype, weight.shape, weight.nbytes)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor `name`, or its part `index` as numpy slices it; of rows and columns only those are decoded."""
        if (weight := self.encoded.get(name)) is None:
            return self.files.read(name, index)
        given = index or ()
        given = (*given, *[slice(None)] * (weight.ndim - len(given)))
        cuts = [range(n)[cut] for n, cut in zip(weight.shape, given, strict=True)]
        if any(cut.step != 1 for cut in cuts):
            return self.read(name)[index]
        rows, *inner = cuts
        columns = slice(cuts[-1].start, cuts[-1].stop)
        middle = tuple(slice(cut.start, cut.stop) for cut in inner[:-1])
        result = np.empty(tuple(map(len, cuts)), weight.dtype)
        rows_at_once = max(1, _CHUNK // max(1, prod(weight.shape[1:-1]) * len(cuts[-1])))
        for done in range(0, result.size and len(rows), rows_at_once):
            part = rows[done : done + rows_at_once]
            result[done : done + len(part)] = weight.decode(part.start, part.stop, columns)[(slice(None), *middle)]
        return result

    def release(self, name: str) -> None:
        """As `Checkpoint.release`, for all parts of the tensor."""
        weight = self.encoded.get(name)
        for part in (name,) if weight is None else weight.parts:
            self.files.release(part)


Weights = Checkpoint | TextPart | Prequantized
"""What a model is loaded from."""


def open_directory(directory: Path, config: Mapping[str, Any]) -> Weights:
    """The weights of a model directory under their plain names, whatever they are stored as.

    Args:
        config: what config.json holds.

    Raises:
        SafetensorsError: as `Checkpoint.open`; or a part of a quantized weight is missing or does not fit.
        ValueError: a quantization that is not supported; the text says which are.
    """
    settings = _settings(directory, config)
    if settings is None:
        return _open(directory, config)
    method = settings.get("quant_method")
    if method not in METHODS:
        raise ValueError(
            f"{directory}: this checkpoint is quantized by {method!r}, which is not supported; supported: "
            f"{', '.join(sorted(METHODS))}. Give one of these or the full-precision checkpoint, and load_in_4bit or "
            "load_in_8bit to quantize while loading"
        )
    if (name := config.get("model_type")) in TRANSPOSED:  # quantizers keep such matrices or turn them as they like
        raise ValueError(f"{directory}: quantized checkpoints of {name} are not supported; give the full-precision one")
    files = _open(directory, config)
    return Prequantized(files, METHODS[method](files, settings), method)


def _open(directory: Path, config: Mapping[str, Any]) -> Checkpoint | TextPart:
    files = Checkpoint.open(directory)
    return TextPart(files) if config.get("model_type") in WITH_VISION else files


def _settings(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the checkpoint says it was quantized; None: it was not."""
    settings, path = config.get("quantization_config"), directory / "config.json"
    if settings is None and (directory / _SIDECAR).is_file():
        path = directory / _SIDECAR
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from error
        settings = content.get("quantization") if isinstance(content, dict) else None
        if isinstance(settings, dict):
            settings = {"quant_method": "modelopt"} | settings
    elif settings is None:
        return None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: the quantization settings are {settings!r:.99}, not an object")
    return settings
