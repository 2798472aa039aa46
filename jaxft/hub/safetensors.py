"""Safetensors files, read by byte range from a memory map (`safetensors_writer` writes them).

A file is an 8-byte little-endian length, that many bytes of JSON, and one buffer. The JSON gives the dtype,
shape and byte range of each tensor; the ranges tile the buffer exactly. Files come from strangers, so the
header is checked in full before a tensor is looked at, and a file of another kind is called by its name.

A tensor is a view into the map: a slice costs the pages it lies on, and `release` gives them back.

Format: https://github.com/huggingface/safetensors#format
"""

import difflib
import json
import math
import mmap
import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import ml_dtypes
import numpy as np

from jaxft.limits import memory_for

DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "F64": np.dtype(np.float64),
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "I64": np.dtype(np.int64),
        "I32": np.dtype(np.int32),
        "I16": np.dtype(np.int16),
        "I8": np.dtype(np.int8),
        "U64": np.dtype(np.uint64),
        "U32": np.dtype(np.uint32),
        "U16": np.dtype(np.uint16),
        "U8": np.dtype(np.uint8),
        "BOOL": np.dtype(np.bool_),
    }
)
MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
_MAX_INT = 2**63 - 1  # what an array can address
_MAX_DIMENSIONS = 64  # what numpy can hold


class SafetensorsError(ValueError):
    """Weights that cannot be read, or cannot be written as asked."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file, which holds it in bytes `begin` to `end`, row-major, little-endian."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class SafetensorsFile:
    """A safetensors file, checked and memory-mapped read-only.

    Views outlive `close`: it drops the file's own hold, and the memory is unmapped with the last view. The
    file must not be truncated in place meanwhile; replacing it by a rename is safe.

    Raises:
        SafetensorsError: the file breaks the format, or is something else; the text says which.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(1024)
            length = int.from_bytes(head[:8], "little")
            if length > MAX_HEADER or head[8:9] != b"{":
                raise SafetensorsError(f"{self.path}: {_what_it_is(self.path, head)}")
            file.seek(8)
            header = file.read(length)
            if len(header) < length:
                raise SafetensorsError(f"{self.path}: {_truncated(8 + length, size)}")
            try:
                self.tensors, self.metadata = parse_header(header, size)
            except SafetensorsError as error:
                raise SafetensorsError(f"{self.path}: {error}") from None
            with memory_for(self.path):
                self._map: mmap.mmap | None = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._map = None

    def info(self, name: str) -> TensorInfo:
        """Where `name` lies; a `SafetensorsError` with the nearest names if it is not in the file."""
        if name not in self.tensors:
            raise SafetensorsError(f"{self.path}: {no_such_tensor(name, self.tensors)}")
        return self.tensors[name]

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor `name`, or its part `index` as numpy slices it: a read-only view, no bytes copied.

        The view may be unaligned, as the format promises no alignment.
        """
        info, mapped = self.info(name), self._mapped()
        whole = np.frombuffer(mapped, np.uint8, info.nbytes, info.begin).view(info.dtype).reshape(info.shape)
        return whole if index is None else whole[(*index, ...)]

    def release(self, name: str) -> None:
        """Drop the tensor's pages from this process's memory; views stay valid and fault them in again."""
        info = self.info(name)
        begin = info.begin - info.begin % mmap.PAGESIZE
        if info.nbytes:
            self._mapped().madvise(mmap.MADV_DONTNEED, begin, info.end - begin)

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            raise SafetensorsError(f"{self.path}: read after close")
        return self._map


def parse_header(header: bytes, size: int) -> tuple[Mapping[str, TensorInfo], Mapping[str, str]]:
    """The tensors, in the order of their data, and the metadata of a file of `size` bytes."""
    entries = strict_json(header)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SafetensorsError("__metadata__ must map strings to strings")
    end = 8 + len(header)
    tensors = {name: _tensor_info(name, entry, end) for name, entry in entries.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    for name, info in tensors.items():
        if info.begin != end:
            fault = "overlaps the data" if info.begin < end else "leaves a hole after the data"
            raise SafetensorsError(f"tensor {name!r:.99} {fault} of the tensor before it")
        end = info.end
    if end > size:
        raise SafetensorsError(_truncated(end, size))
    if end < size:
        raise SafetensorsError(f"{size - end} bytes lie after the last tensor; download it again")
    return MappingProxyType(tensors), MappingProxyType(metadata)


def _tensor_info(name: str, entry: object, start: int) -> TensorInfo:
    where = f"tensor {name!r:.99}"
    if not name or not name.isprintable() or ".." in name or "\\" in name or name[0] in "/~":
        raise SafetensorsError(f"{where}: not an acceptable name")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise SafetensorsError(f"{where}: must have dtype, shape and data_offsets, and nothing else")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise SafetensorsError(f"{where}: dtype {code!r:.99} is not one of {', '.join(DTYPES)}")
    if not _is_int_list(shape, range(_MAX_DIMENSIONS + 1)):
        raise SafetensorsError(f"{where}: shape {shape!r:.99} is not a list of up to {_MAX_DIMENSIONS} sizes")
    if not _is_int_list(offsets, (2,)):
        raise SafetensorsError(f"{where}: data_offsets {offsets!r:.99} are not two positions")
    dtype, (begin, end) = DTYPES[code], offsets
    extent = math.prod(size for size in shape if size) * dtype.itemsize
    if extent > _MAX_INT:
        raise SafetensorsError(f"{where}: shape {shape!r:.99} is too large for any array")
    nbytes = 0 if 0 in shape else extent
    if end - begin != nbytes:
        raise SafetensorsError(f"{where}: {code} {shape} takes {nbytes} bytes, data_offsets hold {end - begin}")
    return TensorInfo(dtype, tuple(shape), start + begin, start + end)


def _is_int_list(value: object, lengths: Container[int]) -> bool:
    return isinstance(value, list) and len(value) in lengths and all(type(item) is int for item in value)


def strict_json(text: bytes) -> dict[str, Any]:
    """A JSON object of UTF-8 text, natural numbers and no key twice, at any depth."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise SafetensorsError(f"key {twice!r:.99} appears twice")
        for string in (*result.keys(), *result.values()):
            if isinstance(string, str):
                string.encode()  # refuses the lone surrogates that a \ud800 escape makes
        return result

    def natural(digits: str) -> int:
        if len(digits) > 19 or digits[0] == "-" or int(digits) > _MAX_INT:
            raise SafetensorsError(f"{digits:.30} is not a size or position")
        return int(digits)

    try:
        parsed = json.loads(text.decode(), object_pairs_hook=unique, parse_int=natural)
    except SafetensorsError:
        raise
    except (ValueError, RecursionError) as error:
        raise SafetensorsError(f"not valid JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise SafetensorsError("not a JSON object")
    return parsed


def _truncated(expected: int, size: int) -> str:
    return f"truncated: the header promises {expected} bytes, the file has {size}; download it again"


def no_such_tensor(name: str, known: Iterable[str]) -> str:
    """What an error says of a name that is not among the known ones: the nearest of them."""
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
    return f"no tensor {name!r}; the nearest names are {', '.join(nearest) or '(none: it is empty)'}"


def _what_it_is(path: Path, head: bytes) -> str:
    """What a file that is no safetensors file is, by its first bytes, and what to do about it."""
    text = head.lstrip().lower()
    if not head:
        return "an empty file: the download failed; download it again"
    if not head.strip(b"\0"):
        return "begins with zeros: the download was not finished; download it again"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the weights: run `git lfs pull` in that clone, or use `hf download`"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "an HTML page, not the weights (a login or error page was saved): use `hf download`"
    if text.startswith((b"{", b"[")):
        return "JSON text, not the weights (a server's error message, or an index): download the file itself"
    if head.startswith(b"GGUF"):
        return "a GGUF file (llama.cpp), whatever its name says: call it .gguf and give its path as the model"
    if head.startswith(b"PK\x03\x04") or re.match(rb"\x80[\x02-\x05][^\0]", head):
        stem = path.stem.removeprefix("pytorch_")
        return f"a PyTorch pickle, whatever its name says. {pickle_conversion([path.name], stem)}"
    return f"not a safetensors file (it begins with {head[:16]!r}), or damaged: download it again"


def pickle_conversion(pickles: list[str], stem: str) -> str:
    """Why pickles are not loaded, and a program that makes `STEM.safetensors` of them."""
    return f"""Loading a pickle can run any code, so it is never loaded here.
If you trust its source, convert it once with PyTorch, in its directory:

    import torch
    from safetensors.torch import save_file
    state = {{}}
    for name in {pickles!r}:
        state |= torch.load(name, map_location="cpu", weights_only=True)
    state = {{name: tensor.clone().contiguous() for name, tensor in state.items()}}
    save_file(state, {stem + ".safetensors"!r}, metadata={{"format": "pt"}})
"""
