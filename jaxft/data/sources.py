"""Where examples come from: files, saved datasets and the Hugging Face Hub, as records with their origin.

JSON is read strictly, because a tolerant reader trains on what nobody meant: duplicate keys, NaN, lines that
are no objects, broken UTF-8 and empty files are errors that name the file and the line. What a `.json` or
`.jsonl` file holds, one array or one object per line, is told by its first character, not by its name.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.redact import redact

TABLES = {".csv": ",", ".tsv": "\t"}
LONGEST_FIELD = 2**31 - 1  # characters; all that a C long holds everywhere
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", *TABLES)


class Record(NamedTuple):
    """One record: column -> value, and where it stands (`file:line`)."""

    values: dict[str, Any]
    origin: str
    filled: int = 0


class BadRecord(NamedTuple):
    """A record that cannot be used, and why."""

    origin: str
    reason: str


def read(
    path: str, *, split: str | None = None, name: str | None = None, max_examples: int | None = None
) -> list[Record]:
    """The records of a file, of a directory written by `datasets.save_to_disk`, or of a dataset on the hub.

    Args:
        path: what exists on disk is read from disk; anything else is a name on the hub.
        split: of a saved or hub dataset; "train" where none is given. Files have none.
        name: subset (configuration) of a hub dataset.
        max_examples: stop after this many records.

    Raises:
        ValueError: with the file, the line and the reason.
    """
    where = Path(path).expanduser()
    if where.is_dir():
        records = _read_saved(where, split)
    elif where.is_file() and split not in (None, "train"):
        raise ValueError(f"{path}: a file has no split {split!r}; remove `split`, or name the file of that split")
    elif where.is_file():
        records = _read_file(where, path)
    elif path.endswith(SUFFIXES) or path.startswith((".", "/", "~")):
        raise ValueError(f"{path}: no such file")
    else:
        records = _read_hub(path, name, split or "train")
    found = list(islice(records, max_examples))
    if not found:
        raise ValueError(f"{path}: there are no records in it")
    return found


def parse_json(text: str) -> Any:
    """JSON as the standard has it: ValueError for NaN, Infinity and duplicate keys as well."""
    text = text.strip(_BLANK)
    value, end = _DECODER.raw_decode(text)
    if end != len(text):
        raise ValueError(f"there is more after the end of the value, from column {end + 1} on")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return values


def _no_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_BLANK = " \t\r\n"
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _read_file(path: Path, shown: str) -> Iterator[Record]:
    if path.name.endswith((".jsonl", ".json", ".jsonl.gz", ".json.gz")):
        return _read_json(path, shown)
    if path.suffix in TABLES:
        return _read_table(path, shown)
    if path.suffix == ".parquet":
        return _read_parquet(path, shown)
    raise ValueError(f"{shown}: unknown kind of file; a source ends in one of {', '.join(SUFFIXES)}")


def _read_json(path: Path, shown: str) -> Iterator[Record]:
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{shown}: damaged gzip file ({error})") from None
    _refuse_impostor(data, shown)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{shown}:{line}: not UTF-8 (byte 0x{data[error.start]:02x})") from None
    if not text.strip(_BLANK):
        raise ValueError(f"{shown}: the file is empty")
    return _array(text, shown) if text.lstrip(_BLANK).startswith("[") else _lines(text, shown)


def _refuse_impostor(data: bytes, shown: str) -> None:
    start = data[:200].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{shown}: a git-lfs pointer, not the data; fetch the file with `git lfs pull`")
    if start.startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{shown}: a web page, not data; download the raw file")


def _lines(text: str, shown: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip(_BLANK):
            continue
        origin = f"{shown}:{number}"
        try:
            values = parse_json(line)
        except (ValueError, RecursionError) as error:
            shape = "the file must hold one object per line, or one array of objects"
            raise ValueError(f"{origin}: not JSON: {_reason(error)}; {shape}") from None
        yield _record(values, origin)


def _array(text: str, shown: str) -> Iterator[Record]:
    position = _skip_blank(text, text.index("[") + 1)
    line = text.count("\n", 0, position) + 1
    while text[position : position + 1] != "]":
        try:
            values, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            where = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise ValueError(f"{shown}:{where}: not JSON: {_reason(error)}") from None
        yield _record(values, f"{shown}:{line}")
        after = _skip_blank(text, end)
        separator = text[after : after + 1]
        following = _skip_blank(text, after + 1) if separator == "," else after
        line, position = line + text.count("\n", position, following), following
        if separator not in (",", "]") or (separator == "," and text[following : following + 1] == "]"):
            raise ValueError(f"{shown}:{line}: not JSON: expected ',' and a record, or ']', after a record")
    if _skip_blank(text, position + 1) != len(text):
        raise ValueError(f"{shown}:{line}: there is more after the end of the array")


def _skip_blank(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return "too deeply nested" if isinstance(error, RecursionError) else str(error)


def _record(values: Any, origin: str) -> Record:
    if not isinstance(values, dict):
        raise ValueError(f"{origin}: a record must be an object, not {type(values).__name__}")
    return Record(values, origin)


def _read_table(path: Path, shown: str) -> Iterator[Record]:
    csv.field_size_limit(LONGEST_FIELD)  # of the process; the default is shorter than a long document
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=TABLES[path.suffix], strict=True)
        line = 1
        try:
            header = next(rows, None)
            if not header:
                raise ValueError("the file is empty")
            if len(set(header)) < len(header):
                raise ValueError(f"a column is there twice: {', '.join(header)}")
            line = rows.line_num + 1
            for row in rows:
                if row and len(row) != len(header):
                    raise ValueError(f"{len(row)} fields, but the header has {len(header)}: {', '.join(header)}")
                if row:
                    yield Record(dict(zip(header, row, strict=True)), f"{shown}:{line}")
                line = rows.line_num + 1
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{shown}:{line}: {error}") from None


def _read_parquet(path: Path, shown: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    _refuse_impostor(path.read_bytes()[:200], shown)
    row = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for values in batch.to_pylist():
                row += 1
                yield Record(values, f"{shown}:{row}")
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{shown}: not a readable Parquet file, after row {row}: {error}") from None


def _read_saved(path: Path, split: str | None) -> Iterator[Record]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: a directory, but not one that `datasets.save_to_disk` wrote; name a file in it instead"
        ) from None
    if isinstance(saved, datasets.DatasetDict):
        if (split or "train") not in saved:
            raise ValueError(f"{path}: no split {split or 'train'!r}; there are: {', '.join(saved)}")
        saved = saved[split or "train"]
    elif split not in (None, "train"):
        raise ValueError(f"{path}: a single saved dataset has no split {split!r}; remove `split`")
    return (Record(values, f"{path}:{row}") for row, values in enumerate(saved, 1))


def _read_hub(path: str, name: str | None, split: str) -> Iterator[Record]:
    import datasets

    try:
        rows = datasets.load_dataset(path, name, split=split)
    except Exception as error:
        raise ValueError(
            f"{path}: no such file, and the hub did not give it: {type(error).__name__}: {redact(str(error))}\n"
            f"To use a hub dataset offline, run this where there is a network, then copy data/ and name it:\n"
            f"  python -c 'from datasets import *; load_dataset({_call(path, name, split)})"
            f'.save_to_disk("data")\''
        ) from None
    return (Record(values, f"{path}[{split}]:{row}") for row, values in enumerate(rows, 1))


def _call(path: str, name: str | None, split: str) -> str:
    subset = f', "{name}"' if name else ""
    return f'"{path}"{subset}, split="{split}"'
