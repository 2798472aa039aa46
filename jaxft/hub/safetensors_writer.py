"""Safetensors files, written one tensor at a time: the host never needs room for more.

A file appears under its name complete and synced to disk, or not at all. The header is checked by the reader's rules
before a tensor is asked for.
"""

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import ArrayLike

from jaxft.hub.safetensors import DTYPES, MAX_HEADER, SafetensorsError, parse_header

METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})  # as every Hugging Face tool writes it
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PIECE = 64 << 20  # bytes made contiguous at a time


class ArraySpec(Protocol):
    """Anything with a dtype and a shape: an array, a `jax.ShapeDtypeStruct`, a `TensorInfo`."""

    @property
    def dtype(self) -> Any: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def write_safetensors(
    path: str | os.PathLike[str],
    specs: Mapping[str, ArraySpec],
    produce: Callable[[str], ArrayLike],
    metadata: Mapping[str, str] = METADATA,
) -> None:
    """Write the tensors that `specs` describes, in its order, asking `produce` for one after the other.

    `write_safetensors(path, arrays, arrays.__getitem__)` writes a dict of arrays. Whatever an array's strides
    and byte order, the file is row-major and little-endian. It appears at `path` complete and synced to disk,
    replacing what was there; after an error `path` is as it was and nothing else is left.

    Raises:
        SafetensorsError: a name, dtype or metadata that the format cannot hold; a produced array of another
            dtype or shape than announced; not enough disk.
    """
    path = Path(path)
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, spec in specs.items():
        code = _CODES.get(_native(spec.dtype))
        if code is None:
            raise SafetensorsError(f"{path}: tensor {name!r}: the format has no dtype {spec.dtype}")
        end = offset + nbytes_of(spec)
        entries[name] = {"dtype": code, "shape": list(map(int, spec.shape)), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    header += b" " * (-len(header) % 8)
    size = 8 + len(header) + offset
    try:
        if len(header) > MAX_HEADER:
            raise SafetensorsError(f"a header of {len(header)} bytes exceeds {MAX_HEADER}; use shards")
        parse_header(header, size)
    except SafetensorsError as error:
        raise SafetensorsError(f"{path}: cannot be written: {error}") from None
    require_space(path.parent, size)
    with atomic_file(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, spec in specs.items():
            try:
                _write_array(file, spec, produce(name))
            except SafetensorsError as error:
                raise SafetensorsError(f"{path}: tensor {name!r}: {error}") from None


def _write_array(file: BinaryIO, spec: ArraySpec, produced: ArrayLike) -> None:
    """Row-major little-endian bytes, made a piece at a time: a strided array is never copied whole."""
    array, dtype = np.asarray(produced), _native(spec.dtype)
    if array.shape != tuple(spec.shape) or _native(array.dtype) != dtype:
        raise SafetensorsError(f"announced as {dtype} {spec.shape}, produced as {array.dtype} {array.shape}")
    array = np.atleast_1d(array)
    rows = max(1, _PIECE * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), rows):
        piece = np.ascontiguousarray(array[start : start + rows], dtype=dtype)
        file.write(piece.reshape(-1).view(np.uint8))


def _native(dtype: Any) -> np.dtype:
    return np.dtype(dtype).newbyteorder("=")


def nbytes_of(spec: ArraySpec) -> int:
    """What an array of that dtype and shape takes in a file."""
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def require_space(directory: Path, size: int) -> None:
    """Raise an `OSError`, as the system would later, unless the disk of `directory` has `size` bytes free."""
    free = shutil.disk_usage(directory).free
    if size > free:
        reason = f"{size} bytes are to be written, the disk has {free} free"
        raise OSError(errno.ENOSPC, reason, str(directory))


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that comes to be at `path` complete and synced, or not at all."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable, as after a rename."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
