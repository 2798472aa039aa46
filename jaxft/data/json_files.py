"""JSON files: one object per line, one array of objects, or one object in a layout of `json_objects`.

Which of them a file holds is told by its first lines, not by its name. Lines are read as they are needed. An
array is held as text, and its records are parsed as they are needed, each with its own line.
"""

import json
import re
import shlex
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from jaxft.data.json_objects import Members, Parsed, as_record, records_of
from jaxft.data.records import BadRecord, Record, Say
from jaxft.data.strict_json import end_of, parse_at, parse_json, reason
from jaxft.data.text_files import Utf8, open_text

#: What may stand around a record: blanks, a byte order mark where files were joined, the end-of-file of DOS, and
#: the separator of JSON text sequences.
_AROUND = " \t\r\n\ufeff\x1a\x1e"
_LINES = re.compile(r"\.(jsonl|ndjson)(\.\w+)?$", re.I)
_BLANKS = re.compile(r"[ \t\r\n]*")
#: Filled lines that are looked at to tell a broken first line from an object over many lines.
_LOOK_AHEAD = 20


def read_json(path: Path, shown: str, split: str | None, say: Say) -> Iterator[Record | BadRecord]:
    """The records of a JSON file.

    Args:
        split: which list of an object of lists; None = "train", or the only list.
        say: takes what was decided here.
    """
    utf8 = Utf8(shown)
    with open_text(path, shown, newline=None) as file:
        lines = enumerate(file, 1)
        ahead, whole = _begin(lines)
        if not any(line.strip(_AROUND) for _, line in ahead):
            raise ValueError(f"{shown}: the file is empty")
        if whole:
            scan = _Scan("".join(line for _, line in ahead) + file.read(), shown, utf8)
            if scan.peek() == "[":
                _refuse_split(shown, split)
                for parsed in scan.elements():
                    yield as_record(parsed, f"{shown}:{parsed.line}")
                scan.end("array")
            else:
                start, members = scan.line, scan.members()
                scan.end("object")
                is_line = scan.line == start and _LINES.search(shown) is not None
                yield from records_of(members, shown, start, is_line, split, say)
        else:
            _refuse_split(shown, split)
            yield from _read_lines(chain(ahead, lines), shown, utf8)
    utf8.finish()


def _refuse_split(shown: str, split: str | None) -> None:
    if split not in (None, "train"):
        raise ValueError(f"{shown}: a file has no split {split!r}; remove `split`, or name the file of that split")


def _begin(lines: Iterator[tuple[int, str]]) -> tuple[list[tuple[int, str]], bool]:
    """The first lines, as many as it takes to tell whether the file is one value; and whether it is."""
    ahead: list[tuple[int, str]] = []
    before, alone, filled = "", False, 0
    for number, line in lines:
        ahead.append((number, line))
        text = line.strip(_AROUND)
        if not text:
            continue
        if not before and text[0] != "{":
            return ahead, text[0] == "["
        if not before:
            alone = _is_object(text)
        elif alone or (before[-1] not in "[{,:" and _is_object(text)):
            return ahead, False
        before, filled = text, filled + 1
        if filled == _LOOK_AHEAD:
            break
    return ahead, True


def _is_object(text: str) -> bool:
    """Whether a line is an object by itself, right or wrong in what it says."""
    try:
        return text[0] == "{" and end_of(text, 0) == len(text)
    except (ValueError, RecursionError):
        return False


def _read_lines(lines: Iterator[tuple[int, str]], shown: str, utf8: Utf8) -> Iterator[Record | BadRecord]:
    for number, line in lines:
        text = line.strip(_AROUND)
        if not text:
            continue
        origin = f"{shown}:{number}"
        fault = utf8.fault(text, origin)
        try:
            record = as_record(Parsed(number, None if fault else parse_json(text), fault), origin)
        except (ValueError, RecursionError) as error:
            cut = "" if line.endswith("\n") else "; the file ends in this line, so it may be cut off"
            record = BadRecord(origin, reason(error) + cut)
        yield record


class _Scan:
    """Walks a text that is one array or object, so that each part is parsed alone and knows its line."""

    def __init__(self, text: str, shown: str, utf8: Utf8):
        self._text, self._shown, self._utf8 = text.rstrip(_AROUND), shown, utf8
        self._position = len(text) - len(text.lstrip(_AROUND))
        self.line = 1 + text.count("\n", 0, self._position)

    def peek(self) -> str:
        return self._text[self._position : self._position + 1]

    def elements(self) -> Iterator[Parsed]:
        """Of the array that begins here."""
        self._step()
        while self.peek() != "]":
            yield self._value()
            separator = self.peek()
            if separator == ",":
                self._step()
            if separator not in (",", "]") or (separator == "," and self.peek() == "]"):
                raise self._error("expected ',' and a record, or ']', after a record")
        self._step()

    def members(self) -> Members:
        """Of the object that begins here: key -> value, or the list of elements where the value is an array."""
        members: Members = {}
        self._step()
        while self.peek() != "}":
            key = self._value()
            if key.fault or not isinstance(key.value, str) or self.peek() != ":":
                raise self._error(key.fault or "expected a key in double quotes and ':'")
            if key.value in members:
                raise self._error(f"key {key.value!r} is there twice")
            self._step()
            members[key.value] = list(self.elements()) if self.peek() == "[" else self._value()
            separator = self.peek()
            if separator == ",":
                self._step()
            if separator not in (",", "}") or (separator == "," and self.peek() == "}"):
                raise self._error("expected ',' and a key, or '}', after a value")
        self._step()
        return members

    def end(self, what: str) -> None:
        """ValueError if there is more."""
        more = self.peek()
        if more == "{":
            command = f"jq -c . {shlex.quote(self._shown)} > lines.jsonl"
            raise self._error(f"there is more after the end of the {what}; write one object per line: {command}")
        if more == ",":
            raise self._error(f"there is more after the end of the {what}: a comma; put [ before all and ] after all")
        if more == "[":
            form = '{"messages": [...]}'
            raise self._error(f"there is more after the end of the {what}; a record must be an object, as in {form}")
        if more:
            raise self._error(f"there is more after the end of the {what}")

    def _step(self) -> None:
        """Over one character and the blanks after it."""
        self._to(min(self._position + 1, len(self._text)))

    def _to(self, position: int) -> None:
        position = _BLANKS.match(self._text, position).end()
        self.line += self._text.count("\n", self._position, position)
        self._position = position

    def _value(self) -> Parsed:
        start, line, value, fault = self._position, self.line, None, None
        try:
            value, end = parse_at(self._text, start)
        except json.JSONDecodeError as error:
            cut = "" if "\n" in self._text[error.pos :] else "; the file ends in this line, so it may be cut off"
            raise ValueError(f"{self._shown}:{error.lineno}: {reason(error)}{cut}") from None
        except RecursionError as error:
            raise ValueError(f"{self._shown}:{line}: {reason(error)}") from None
        except ValueError as error:
            fault, end = reason(error), end_of(self._text, start)
        fault = self._utf8.fault(self._text[start:end], f"{self._shown}:{line}") or fault
        self._to(end)
        return Parsed(line, value, fault)

    def _error(self, what: str) -> ValueError:
        return ValueError(f"{self._shown}:{self.line}: not JSON: {what}")
