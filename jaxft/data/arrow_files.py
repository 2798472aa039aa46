"""Tables of Arrow: Parquet and Arrow files, and what `datasets` holds, as the values that were meant.

Arrow gives every object of a column all keys that any of them has, and null where one has none. Such nulls are
no values: at any depth they are left out and counted. (A null that was written cannot be told from them.) What
stays: nulls of whole columns, and null elements of lists.

Columns of JSON, which Arrow's JSON type or the features that `datasets` writes beside a table tell, are read as
the values they hold, nulls included. Maps are read as objects.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxft.data.records import BadRecord, Record
from jaxft.data.strict_json import parse_json, reason
from jaxft.data.text_files import head_of, looks_like

if TYPE_CHECKING:
    import pyarrow

#: Rows that are made into records at a time.
BATCH = 1000


def read_parquet(path: Path, shown: str, limit: int | None) -> Iterator[Record | BadRecord]:
    """The records of a Parquet file; no more of it is decoded than `limit` rows need."""
    import pyarrow.parquet

    _refuse_impostor(path, shown, b"PAR1", "Parquet")
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            for record in read_batches(file.iter_batches(min(limit or BATCH, BATCH)), file.schema_arrow, shown):
                row += 1
                yield record
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{shown}: not a readable Parquet file, after row {row}: {error}") from None


def read_arrow(path: Path, shown: str) -> Iterator[Record | BadRecord]:
    """The records of an Arrow file (Feather is one), or of a stream of Arrow written to a file."""
    import pyarrow.ipc

    row = 0
    try:
        with pyarrow.memory_map(str(path)) as source:
            if head_of(path).startswith(b"ARROW1"):
                with pyarrow.ipc.open_file(source) as file:
                    batches = (file.get_batch(number) for number in range(file.num_record_batches))
                    for record in read_batches(batches, file.schema, shown):
                        row += 1
                        yield record
            else:
                _refuse_impostor(path, shown, b"\xff\xff\xff\xff", "Arrow")
                with pyarrow.ipc.open_stream(source) as stream:
                    for record in read_batches(stream, stream.schema, shown):
                        row += 1
                        yield record
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{shown}: not a readable Arrow file, after row {row}: {error}") from None


def _refuse_impostor(path: Path, shown: str, magic: bytes, name: str) -> None:
    head = head_of(path)
    if not head.startswith(magic):
        kind = looks_like(head) or (
            "the file is empty" if not head else f"not a readable {name} file; it begins otherwise"
        )
        raise ValueError(f"{shown}: {kind}")


def read_batches(
    batches: "Iterable[pyarrow.RecordBatch | pyarrow.Table]", schema: "pyarrow.Schema", shown: str
) -> Iterator[Record | BadRecord]:
    """The rows of batches of one schema.

    Args:
        shown: of what; a row's origin is `shown:row`, from 1 on.
    """
    if len(set(schema.names)) < len(schema.names):
        raise ValueError(f"{shown}: a column is there twice: {', '.join(schema.names)}")
    values = _Values(schema)
    row = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH):
            for record in values.records(batch.slice(start, BATCH), shown, row):
                row += 1
                yield record


class _Values:
    """Makes records of rows. `_filled` counts the nulls left out of the row at hand."""

    def __init__(self, schema: "pyarrow.Schema"):
        features = _features(schema)
        self._meant = {field.name: self._of(field.type, features.get(field.name)) for field in schema}
        self._filled = 0

    def records(self, batch: "pyarrow.RecordBatch | pyarrow.Table", shown: str, before: int) -> Iterator[Any]:
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError):
            rows = [None] * batch.num_rows  # one of them cannot be had: each by itself
        for number, row in enumerate(rows):
            origin = f"{shown}:{before + number + 1}"
            self._filled = 0
            name = ""
            try:
                values = {}
                for name, meant in self._meant.items():
                    value = batch.column(name)[number].as_py() if row is None else row[name]
                    values[name] = meant(value) if meant and value is not None else value
            except (ValueError, OverflowError, RecursionError) as error:
                yield BadRecord(origin, f"`{name}`: {_words(error)}")
            else:
                yield Record(values, origin, self._filled)

    def _of(self, type: "pyarrow.DataType", feature: Any) -> Callable[[Any], Any] | None:
        """What makes the value that was meant of one that Arrow gives; None where they are the same."""
        import pyarrow
        from pyarrow import types

        if isinstance(type, pyarrow.JsonType) or (_is_text(type) and _kind(feature) == "Json"):
            return _parse
        if isinstance(type, pyarrow.BaseExtensionType):
            return self._of(type.storage_type, feature)
        if types.is_dictionary(type) or types.is_run_end_encoded(type):
            return self._of(type.value_type, feature)
        if types.is_struct(type):
            inside = feature if isinstance(feature, dict) and _kind(feature) is None else {}
            return self._object({field.name: self._of(field.type, inside.get(field.name)) for field in type})
        if types.is_map(type):
            return self._map(self._of(type.item_type, None))
        if types.is_nested(type) and hasattr(type, "value_type"):
            element = self._of(type.value_type, _element(feature))
            return element and (lambda values: [value if value is None else element(value) for value in values])
        return None

    def _object(self, meant: dict[str, Callable[[Any], Any] | None]) -> Callable[[Any], Any]:
        def convert(values: dict[str, Any]) -> dict[str, Any]:
            there = {name: value for name, value in values.items() if value is not None}
            self._filled += len(values) - len(there)
            return {name: of(value) if (of := meant[name]) else value for name, value in there.items()}

        return convert

    def _map(self, meant: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
        def convert(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
            values = {key: meant(value) if meant and value is not None else value for key, value in pairs}
            if len(values) < len(pairs):
                keys = [key for key, _ in pairs]
                raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
            return values

        return convert


def _parse(text: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(reason(error)) from None


def _is_text(type: "pyarrow.DataType") -> bool:
    from pyarrow import types

    return types.is_string(type) or types.is_large_string(type) or types.is_string_view(type)


def _features(schema: "pyarrow.Schema") -> dict[str, Any]:
    """Column -> its feature, as `datasets` writes them beside the schema; {} where it did not."""
    written = parse_json((schema.metadata or {}).get(b"huggingface", b"{}").decode())
    return (written.get("info") or {}).get("features") or {}


def _kind(feature: Any) -> str | None:
    """Name of a feature that is no object of features."""
    kind = feature.get("_type") if isinstance(feature, dict) else None
    return kind if isinstance(kind, str) else None


def _element(feature: Any) -> Any:
    if isinstance(feature, list):  # as older versions write a list
        return feature[0] if feature else None
    return feature.get("feature") if _kind(feature) in ("List", "LargeList", "Sequence") else None


def _words(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte 0x{error.object[error.start]:02x})"
    return "too deeply nested" if isinstance(error, RecursionError) else str(error)
