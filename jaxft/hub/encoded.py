"""Represents a weight of a quantized checkpoint by its codes, scales and other tensors.

Each format is a kind of `Encoded`: it knows the tensors of the file that make up one weight, has checked that they
fit, and decodes any rows of the weight. Everything is numpy, as it runs on the host while a model streams in.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxft.hub.safetensors import SafetensorsError, TensorInfo

FLOAT32 = np.dtype(np.float32)
FLOATS = ("float32", "bfloat16", "float16")
"""The dtypes of scales."""


class Files(Protocol):
    """Tensors as they are stored: a `Checkpoint`, or a file of another kind that reads like one."""

    directory: Path
    metadata: Mapping[str, str]

    def names(self) -> tuple[str, ...]: ...
    def __contains__(self, name: str) -> bool: ...
    def path(self, name: str) -> Path: ...
    def info(self, name: str) -> TensorInfo: ...
    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray: ...
    def release(self, name: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Encoded(ABC):
    """One weight.

    Attributes:
        files: hold it.
        shape: of the weight, as the model's config has it.
        parts: names of all tensors that belong to it, those too that decoding does without.
        dtype: dtype of the result of `decode`.
        coded: the file holds codes, not the values themselves.
    """

    files: Files
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    dtype: np.dtype = FLOAT32
    coded: bool = True

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the file."""
        return sum(self.files.info(part).nbytes for part in self.parts)

    @abstractmethod
    def decode(self, begin: int, end: int, columns: slice) -> np.ndarray:
        """The values at `begin` to `end` of the first axis and at `columns`, two positions, of the last.

        A weight of one axis has no columns; the argument is ignored.
        """


def check_part(
    files: Files, name: str, *, of: str, dtypes: Collection[str], shape: tuple[int, ...] | None = None
) -> None:
    """Raise SafetensorsError unless the files hold `name`, a part of the weight `of`, with this dtype and shape."""
    if name not in files:
        raise SafetensorsError(f"{files.directory}: {name} is missing; without it {of} cannot be decoded")
    info = files.info(name)
    if info.dtype.name not in dtypes:
        raise wrong_part(files, name, of, f"is {info.dtype.name}, expected {' or '.join(dtypes)}")
    if shape is not None and info.shape != shape:
        raise wrong_part(files, name, of, f"is of shape {info.shape}, expected {shape}")


def wrong_part(files: Files, name: str, of: str, fault: str) -> SafetensorsError:
    """The error for a part that is there, but is not what the weight `of` needs."""
    about = "" if name == of else f", a part of {of},"
    return SafetensorsError(f"{files.path(name)}: {name}{about} {fault}")
