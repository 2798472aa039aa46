"""A JSON file that is one object: which records are in it.

    {"train": [{...}, ...], "test": [...]}            lists of records by split
    {"version": "1.0", "data": [{...}, ...]}          one list of records, with things beside it
    {"id 1": {...}, "id 2": {...}}                    records by id
    {"prompt": ["a", "b"], "completion": ["c", "d"]}  columns as lists, or as pandas writes them, as
    {"prompt": {"0": "a", "1": "b"}, ...}             objects of rows
    {"messages": [{"role": ..., ...}, ...]}           one record, as is anything else

Where an object may be read in several ways, it is refused with what to do. What was decided is said.
"""

import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxft.data.records import BadRecord, Record, Say


class Parsed(NamedTuple):
    """A value with the line where it begins, or why it is not one."""

    line: int
    value: Any
    fault: str | None = None


Members = dict[str, Parsed | list[Parsed]]

#: Lists under these names belong to a record.
_OF_A_RECORD = ("tools", "functions", "images", "documents")
#: Text under these names makes an object a record.
_TEXTS = ("text", "prompt", "completion", "instruction", "input", "output", "question", "answer", "query", "response")
#: Keys of a turn: under any name of a list, and under the names of lists of turns.
_TURNS = ({"role"}, {"from", "value"}, {"speaker", "text"})
_LISTS_OF_TURNS = ("messages", "conversations", "conversation", "dialog", "dialogue", "turns", "chat", "history")
_SPEAKERS = {"author", "sender", "speaker", "from", "user", "name", "type"}
_SPEECH = {"content", "value", "text", "message", "parts"}
_HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval")
_KINDS = {list: "an array", str: "a string", bool: "true or false", int: "a number", float: "a number"}


def as_record(parsed: Parsed, origin: str) -> Record | BadRecord:
    """A value as a record, if it is one."""
    if parsed.fault:
        return BadRecord(origin, parsed.fault)
    if not isinstance(parsed.value, dict):
        return BadRecord(origin, f"a record must be an object, not {_KINDS.get(type(parsed.value), 'null')}")
    return Record(parsed.value, origin)


def records_of(
    members: Members, shown: str, line: int, is_line: bool, split: str | None, say: Say
) -> Iterator[Record | BadRecord]:
    """The records in an object.

    Args:
        members: of the object that a file holds.
        shown: name of the file.
        line: where the object begins.
        is_line: the object is the one line of a file that should be JSON lines by its name: a record, where that is
            likelier.
        split: key of the list to read; None = "train", or the only one.
        say: takes what was decided.
    """
    lists = {key: value for key, value in members.items() if _holds_records(key, value)}
    if isinstance(members.get(split or "train"), list):
        return _under(split or "train", members, shown, say)
    if split not in (None, "train") or (split and any(key.lower() in _HELD_OUT for key in lists)):
        there = f"; there are: {', '.join(lists)}" if lists else "; remove `split`, or name the file of that split"
        raise ValueError(f"{shown}: a file has no split {split!r}{there}")
    one = [as_record(Parsed(line, *_joined(members)), f"{shown}:{line}")]
    texts = [key for key in members if key.lower() in _TEXTS and key not in lists]
    if is_line and (texts or not lists):
        return iter(one)
    if any(_are_turns(key, value) for key, value in members.items()):
        return iter(one)
    if lists:
        if len(lists) > 1 or texts:
            sizes = ", ".join(f"{key} ({len(value)})" for key, value in lists.items())
            or_one = f"; if the file is one record (it has {', '.join(texts)}), put [ and ] around it" if texts else ""
            raise ValueError(
                f"{shown}: an object with lists of objects: {sizes}; name the one to read, as in "
                f"`split: {next(iter(lists))}`{or_one}"
            )
        return _under(next(iter(lists)), members, shown, say)
    if {"columns", "data"} <= set(members):
        raise ValueError(
            f"{shown}: a table as pandas writes it with orient='split'; write it with orient='records', lines=True"
        )
    if members and all(isinstance(value, list) for value in members.values()):
        return _from_columns(members, shown, say)
    if members and all(isinstance(value, Parsed) and _is_object(value) for value in members.values()):
        return _from_objects(members, shown, say)
    return iter(one)


def _holds_records(key: str, value: Parsed | list[Parsed]) -> bool:
    if not isinstance(value, list) or key in _OF_A_RECORD or _are_turns(key, value):
        return False
    return any(isinstance(element.value, dict) for element in value)


def _are_turns(key: str, value: Parsed | list[Parsed]) -> bool:
    if not isinstance(value, list) or not value:
        return False
    weak = key.lower() in _LISTS_OF_TURNS
    return all(isinstance(part.value, dict) and _is_turn(set(part.value), weak) for part in value)


def _is_turn(keys: set[str], weak: bool) -> bool:
    return any(turn <= keys for turn in _TURNS) or bool(weak and keys & _SPEAKERS and keys & _SPEECH)


def _is_object(parsed: Parsed) -> bool:
    return parsed.fault is not None or isinstance(parsed.value, dict)


def _joined(members: Members) -> tuple[dict[str, Any], str | None]:
    """The object as it stood, and the first fault in it."""
    faults = [p.fault for value in members.values() for p in (value if isinstance(value, list) else [value]) if p.fault]
    values = {k: [part.value for part in v] if isinstance(v, list) else v.value for k, v in members.items()}
    return values, faults[0] if faults else None


def _under(key: str, members: Members, shown: str, say: Say) -> Iterator[Record | BadRecord]:
    beside = [other for other in members if other != key]
    say(f"{shown}: read the list under `{key}`" + (f"; not read: {', '.join(beside)}" if beside else ""))
    return (as_record(parsed, f"{shown}[{key}]:{parsed.line}") for parsed in members[key])


def _from_columns(columns: dict[str, list[Parsed]], shown: str, say: Say) -> Iterator[Record | BadRecord]:
    lengths = {key: len(column) for key, column in columns.items()}
    if len(set(lengths.values())) > 1:
        sizes = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise ValueError(f"{shown}: an object of columns, but of different lengths: {sizes}; write one object per row")
    say(f"{shown}: read as columns: {', '.join(columns)}")
    return _rows(columns, [str(row) for row in range(next(iter(lengths.values())))], shown)


def _from_objects(members: dict[str, Parsed], shown: str, say: Say) -> Iterator[Record | BadRecord]:
    inner = {tuple(parsed.value) for parsed in members.values() if parsed.fault is None}
    rows = next(iter(inner), ())
    if len(inner) == 1 and rows and all(map(str.isdecimal, rows)) and not all(map(str.isdecimal, members)):
        say(f"{shown}: read as columns: {', '.join(members)}")
        columns = {
            key: [Parsed(parsed.line, None if parsed.fault else parsed.value[row], parsed.fault) for row in rows]
            for key, parsed in members.items()
        }
        return _rows(columns, rows, shown)
    values = [value for parsed in members.values() for value in (parsed.value or {"": ""}).values()]
    if not any(map(_is_content, values)) or all(key.lower() in ("train", *_HELD_OUT) for key in members):
        key = next(iter(members))
        raise ValueError(
            f"{shown}: an object of objects, and the records are deeper; take out what holds them, as with "
            f"jq '.{key}' {shlex.quote(shown)} > {key}.json"
        )
    say(f"{shown}: read as records by id, as in {next(iter(members))!r}")
    return (as_record(parsed, f"{shown}[{key}]") for key, parsed in members.items())


def _is_content(value: Any) -> bool:
    """Whether a value may be one of a record, and not a record or a list of records."""
    if not isinstance(value, list):
        return not isinstance(value, dict)
    objects = [Parsed(0, part) for part in value if isinstance(part, dict)]
    return len(objects) < max(len(value), 1) or _are_turns("", objects)


def _rows(columns: dict[str, list[Parsed]], names: Any, shown: str) -> Iterator[Record | BadRecord]:
    for name, *parts in zip(names, *columns.values(), strict=True):
        values, fault = _joined(dict(zip(columns, parts, strict=True)))
        yield as_record(Parsed(0, values, fault), f"{shown}[{name}]")
