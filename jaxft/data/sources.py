"""Where examples come from: files, saved datasets and the Hugging Face Hub, as records with their origin.

What exists on disk is read from disk. A name with `*`, `?` or `[` is a pattern, and all files that it matches are
one source. Anything else is a name on the hub. How each kind of file is read stands in a module of its own; a
fault of one record comes as a `BadRecord`, a fault of a file is an error.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from jaxft.data.arrow_files import BATCH, read_arrow, read_batches, read_parquet
from jaxft.data.csv_files import DELIMITERS, read_csv
from jaxft.data.json_files import read_json
from jaxft.data.records import BadRecord, Record, Records, Say
from jaxft.data.text_files import PACKED, head_of, looks_like
from jaxft.redact import redact

if TYPE_CHECKING:
    from datasets import Dataset

_JSON = (".jsonl", ".json", ".ndjson")
_TEXT = (*_JSON, *DELIMITERS)
_BINARY = (".parquet", ".arrow", ".feather")
_LOOKED_AT = 5000  # files and directories in a directory that is no source
_SPLITS = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])")


def read(path: str, *, split: str | None = None, name: str | None = None, max_examples: int | None = None) -> Records:
    """The records of files, of a directory written by `datasets.save_to_disk`, or of a dataset on the hub.

    Of a dataset on the hub the whole split is fetched, whatever `max_examples` is; of files, no more is read than
    it takes (a JSON file that is one array or object is read whole).

    Args:
        path: of one file or directory, a pattern of files, or a name on the hub; `~` is the home directory.
        split: of a saved or hub dataset, or of a JSON file with lists by split; "train" where none is given.
        name: subset (configuration) of a hub dataset.
        max_examples: stop after this many records.

    Raises:
        ValueError: with the file, the line and the reason, where a file cannot be read. A record that cannot be
            read is a `BadRecord` among the others.
    """
    found = Records()
    try:
        with closing(_open(path, split, name, max_examples, found.notes.append)) as records:
            found.extend(islice(records, max_examples))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not found:
        raise ValueError(f"{path}: there are no records in it")
    return found


def _open(path: str, split: str | None, name: str | None, limit: int | None, say: Say) -> Iterator[Record | BadRecord]:
    where = Path(os.path.expanduser(path))
    if name and (where.exists() or glob.has_magic(path)):
        raise ValueError(
            f"{path}: `name` is the subset of a hub dataset, but this is a file or directory; remove `name`"
        )
    if where.is_dir():
        yield from _read_saved(where, path, split)
    elif where.is_file():
        yield from _read_file(where, path, split, limit, say)
    elif glob.has_magic(path):
        yield from _read_pattern(path, split, limit, say)
    elif where.is_symlink():
        raise ValueError(f"{path}: a link to {where.readlink()}, which does not exist")
    elif where.exists():
        raise ValueError(f"{path}: a pipe or device; write what it gives to a file")
    elif "://" in path:
        raise ValueError(f"{path}: addresses are not read; download the file and name it, or name the hub dataset")
    elif path.startswith((".", "/", "~")) or _kind(Path(path)):
        raise ValueError(f"{path}: no such file")
    else:
        yield from _read_hub(path, name, split or "train")


def _kind(path: Path) -> str | None:
    """The suffix that tells how a file is read; None where none does."""
    name = path.name.lower()
    packed = next((suffix for suffix in PACKED if name.endswith(suffix)), "")
    known = _TEXT if packed else (*_TEXT, *_BINARY)
    return next((suffix for suffix in known if name.endswith(suffix + packed)), None)


def _read_file(path: Path, shown: str, split: str | None, limit: int | None, say: Say) -> Iterator[Record | BadRecord]:
    kind = _kind(path)
    if kind in _JSON:
        return read_json(path, shown, split, say)
    if kind and split not in (None, "train"):
        raise ValueError(f"{shown}: a file has no split {split!r}; remove `split`, or name the file of that split")
    if kind in DELIMITERS:
        return read_csv(path, shown, DELIMITERS[kind])
    if kind == ".parquet":
        return read_parquet(path, shown, limit)
    if kind:
        return read_arrow(path, shown)
    if path.suffix.lower() == ".tgz" or ".tar" in path.name.lower():
        raise ValueError(f"{shown}: a tar archive; unpack it")
    if path.suffix.lower() in PACKED:
        inside = f"let it end in .jsonl{path.suffix} or .csv{path.suffix}"
        inside = "unpack it" if _kind(path.with_suffix("")) else f"its name does not say what is in it; {inside}"
        raise ValueError(f"{shown}: {inside}")
    if what := looks_like(head_of(path)):
        raise ValueError(f"{shown}: {what}")
    if path.suffix.lower() in (".txt", ".text", ".md"):
        raise ValueError(
            f"{shown}: plain text does not say where an example ends; write one JSON object per example into a "
            '.jsonl file, as in {"text": "..."}'
        )
    packed = f"; those of text may be packed ({', '.join(PACKED)})"
    raise ValueError(f"{shown}: unknown kind of file; a source ends in one of {', '.join((*_TEXT, *_BINARY))}{packed}")


def _read_pattern(path: str, split: str | None, limit: int | None, say: Say) -> Iterator[Record | BadRecord]:
    matches = [Path(match) for match in sorted(glob.glob(os.path.expanduser(path), recursive=True))]
    files = [match for match in matches if match.is_file()]
    if not files:
        only = f"; it matches directories: {', '.join(map(str, matches[:10]))}" if matches else ""
        raise ValueError(f"{path}: no file matches this pattern{only}")
    kinds = Counter(_kind(file) or file.suffix or "no suffix" for file in files)
    if len(kinds) > 1:
        counts = ", ".join(f"{kind} ({count})" for kind, count in kinds.items())
        raise ValueError(f"{path}: matches files of several kinds: {counts}; end the pattern in one of them")
    splits = {file: frozenset(_SPLITS.findall(f"{file.parent.name}/{file.name}".lower())) for file in files}
    if len(set(splits.values()) - {frozenset()}) > 1:
        raise ValueError(
            f"{path}: matches files of several splits: {_listed([file.name for file in files])}; give each split a "
            "pattern of its own"
        )
    say(f"{path}: {len(files)} files: {_listed([file.name for file in files])}")
    for file in files:
        yield from _read_file(file, str(file), split, limit, say)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _read_saved(path: Path, shown: str, split: str | None) -> Iterator[Record | BadRecord]:
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise ValueError(f"{shown}: a directory that `datasets.save_to_disk` did not write; {_inside(path, shown)}")
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:
        raise ValueError(f"{shown}: a saved dataset that cannot be read: {_said(error)}") from None
    if isinstance(saved, datasets.DatasetDict):
        if (split or "train") not in saved:
            raise ValueError(f"{shown}: no split {split or 'train'!r}; there are: {', '.join(saved)}")
        saved = saved[split or "train"]
    elif split not in (None, "train"):
        raise ValueError(f"{shown}: a single saved dataset has no split {split!r}; remove `split`")
    return _rows(saved, shown)


def _inside(directory: Path, shown: str) -> str:
    """What data a directory holds, and patterns that name it."""
    inside = sorted(path.relative_to(directory) for path in islice(directory.rglob("*"), _LOOKED_AT) if path.is_file())
    data = [path for path in inside if _kind(path) and not any(part.startswith(".") for part in path.parts)]
    if not data:
        return f"it holds {_listed([str(path) for path in inside])}" if inside else "it is empty"
    patterns = dict.fromkeys(str(Path(shown) / path.parent / _pattern(path.name)) for path in data)
    chosen = " or ".join(list(patterns)[:5])
    return f"name the files with a pattern: {chosen}. It holds {_listed([str(path) for path in data])}"


def _pattern(name: str) -> str:
    """A pattern for the files beside one, of its kind and of its split."""
    split = _SPLITS.search(name.lower())
    suffix = "".join(part for part in Path(name).suffixes[-2:] if part.lower() in (*_TEXT, *_BINARY, *PACKED))
    return f"{name[: split.end()] if split else ''}*{suffix}"


def _read_hub(path: str, name: str | None, split: str) -> Iterator[Record | BadRecord]:
    import datasets

    try:
        rows = datasets.load_dataset(path, name, split=split)
    except Exception as error:
        raise ValueError(
            f"{path}: no such file, and the hub did not give it: {_said(error)}\n"
            f"To use a hub dataset offline, run this where there is a network, then copy data/ and name it:\n"
            f"  python -c 'from datasets import *; load_dataset({_call(path, name, split)})"
            f'.save_to_disk("data")\''
        ) from None
    return _rows(rows, f"{path}[{split}]")


def _rows(rows: "Dataset", shown: str) -> Iterator[Record | BadRecord]:
    tables = rows.with_format("arrow").iter(BATCH)
    return read_batches(tables, rows.data.schema, shown)


def _said(error: Exception) -> str:
    return redact(str(error)) or "it gave no reason"


def _call(path: str, name: str | None, split: str) -> str:
    subset = f', "{name}"' if name else ""
    return f'"{path}"{subset}, split="{split}"'
