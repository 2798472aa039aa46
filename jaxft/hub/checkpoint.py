"""The weights of a model directory: one safetensors file, or shards with an index that says which holds what.

Every fault of a download or a conversion shows in the directory: a shard that is missing, an index that disagrees
with its shards, a second set of weights, pickles only. Opening finds it, before a tensor is read. Writing lets the
files appear when all are complete.

The index and the names of the shards are those of transformers.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from jaxft.hub.safetensors import (
    MAX_HEADER,
    SafetensorsError,
    SafetensorsFile,
    TensorInfo,
    no_such_tensor,
    pickle_conversion,
    strict_json,
)
from jaxft.hub.safetensors_writer import (
    METADATA,
    ArraySpec,
    atomic_file,
    nbytes_of,
    require_space,
    write_safetensors,
)
from jaxft.hub.stage import staged_in

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Checkpoint:
    """The tensors of a model directory, whichever file holds each, and the metadata of all files."""

    def __init__(self, directory: Path, files: Sequence[SafetensorsFile]):
        self.directory = directory
        self.metadata = {key: value for file in files for key, value in file.metadata.items()}
        self._files = files
        self._holder = {name: file for file in files for name in file.tensors}

    @classmethod
    def open(cls, directory: str | os.PathLike[str], stem: str = "model") -> Self:
        """The checkpoint `STEM.safetensors`, or `STEM.safetensors.index.json` with the shards that it names.

        Where there is an index, it decides. A `STEM.safetensors` that it does not name is a second set of
        weights, and nobody can know which was meant: an error.

        Raises:
            SafetensorsError: no weights, two sets of them, only pickles, a damaged file, or an index that is
                not exactly what its shards hold.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise SafetensorsError(f"{directory}: no such directory")
        present = sorted(entry.name for entry in directory.iterdir())
        single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        if index in present:
            by_shard = _read_index(directory / index)
            if single in present and single not in by_shard:
                raise SafetensorsError(
                    f"{directory}: holds two sets of weights, {single} and those of {index}; remove one"
                )
        elif single in present:
            by_shard = {single: None}
        else:
            raise SafetensorsError(f"{directory}: {_no_weights(present, stem)}")
        files = []
        for shard, expected in by_shard.items():
            if not (directory / shard).is_file():
                raise SafetensorsError(f"{directory / shard}: no such file (a download not finished?)")
            files.append(SafetensorsFile(directory / shard))
            if expected is not None:
                _compare_keys(files[-1], expected, index)
        return cls(directory, files)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files:
            file.close()

    def names(self) -> tuple[str, ...]:
        """All names, shard by shard, in the order of their data."""
        return tuple(self._holder)

    def __contains__(self, name: str) -> bool:
        return name in self._holder

    def path(self, name: str) -> Path:
        """The file that holds `name`."""
        return self._file(name).path

    def info(self, name: str) -> TensorInfo:
        return self._file(name).info(name)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """As `SafetensorsFile.read`."""
        return self._file(name).read(name, index)

    def release(self, name: str) -> None:
        """As `SafetensorsFile.release`."""
        self._file(name).release(name)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._holder:
            raise SafetensorsError(f"{self.directory}: {no_such_tensor(name, self._holder)}")
        return self._holder[name]


def write_checkpoint(
    directory: str | os.PathLike[str],
    specs: Mapping[str, ArraySpec],
    produce: Callable[[str], ArrayLike],
    *,
    max_shard_bytes: int = 5_000_000_000,
    stem: str = "model",
    metadata: Mapping[str, str] = METADATA,
) -> list[Path]:
    """Write a checkpoint into an existing directory and return its files.

    `specs` and `produce` are as for `write_safetensors`. One `STEM.safetensors` if `max_shard_bytes` holds all, else
    `STEM-00001-of-0000N.safetensors` and an index, as transformers names them; a tensor beyond the limit is a shard of
    its own. The files appear when all are written, the index last; an error while writing leaves none. Weights that
    `directory` already holds under `stem` are an error: beside new ones, nobody could tell which count.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise SafetensorsError(f"{directory}: no such directory")
    refuse_weights(directory, stem)
    if not specs:
        raise SafetensorsError(f"{directory}: a checkpoint of no tensors")
    shards: list[dict[str, ArraySpec]] = [{}]
    room = max_shard_bytes
    for name, spec in specs.items():
        if shards[-1] and nbytes_of(spec) > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = spec
        room -= nbytes_of(spec)
    total = sum(map(nbytes_of, specs.values()))
    require_space(directory, total)
    names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    with staged_in(directory) as stage:
        for name, shard in zip(names, shards, strict=True):
            write_safetensors(stage / name, shard, produce, metadata)
        if len(shards) > 1:
            weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            names.append(f"{stem}.safetensors.index.json")
            with atomic_file(stage / names[-1]) as file:
                file.write(json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")
    return [directory / name for name in names]


def refuse_weights(directory: Path, stem: str = "model") -> None:
    """Raise SafetensorsError where a directory already holds a checkpoint."""
    if stale := [entry.name for entry in directory.iterdir() if _belongs(entry.name, stem)]:
        raise SafetensorsError(f"{directory}: already holds {_a_few(stale)}; remove them or choose another")


def _read_index(path: Path) -> dict[str, set[str]]:
    """shard -> names of its tensors."""
    try:
        if path.stat().st_size > MAX_HEADER:
            raise SafetensorsError(f"larger than {MAX_HEADER} bytes")
        weight_map = strict_json(path.read_bytes()).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise SafetensorsError("has no weight_map from tensor names to shards")
        by_shard: dict[str, set[str]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
                raise SafetensorsError(f"{name!r:.99}: {shard!r:.99} is not the bare name of a safetensors file")
            by_shard.setdefault(shard, set()).add(name)
    except SafetensorsError as error:
        raise SafetensorsError(f"{path}: {error}") from None
    return dict(sorted(by_shard.items()))


def _compare_keys(file: SafetensorsFile, expected: set[str], index: str) -> None:
    missing, extra = expected - file.tensors.keys(), file.tensors.keys() - expected
    if missing or extra:
        raise SafetensorsError(
            f"{file.path} and {index} disagree: only the index has {_a_few(missing)}; "
            f"only the shard has {_a_few(extra)}. Download both again"
        )


def _a_few(names: Collection[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(sorted(names)[:5]) or "nothing") + more


def _no_weights(present: list[str], stem: str) -> str:
    index = f"{stem}.safetensors.index.json"
    if pickles := [name for name in present if stem in name and name.endswith(_PICKLES)]:
        return f"holds its weights only as pickles. {pickle_conversion(pickles, stem)}"
    if shards := [name for name in present if _belongs(name, stem)]:
        return f"holds the shards {_a_few(shards)} without {index}; download it as well"
    return (
        f"holds neither {stem}.safetensors nor {index}, but {_a_few(present)}. "
        "Of a model published as GGUF give the .gguf file itself; one published as pickles only has to be converted"
    )


def _belongs(name: str, stem: str) -> bool:
    return re.fullmatch(rf"{re.escape(stem)}(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name) is not None
