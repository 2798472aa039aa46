"""What reading gives: records, each with where it stands, and what stands there but cannot be read.

A fault of one record does not end the reading, so that a run can name all faults of a file at once. A fault
of a whole file does: it is a ValueError with file and line.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

#: Takes one thing that a reader decided for itself, in words.
Say = Callable[[str], None]


class Record(NamedTuple):
    """One record: column -> value, and where it stands.

    `origin` is `file:line` in files of text, `file:row` in the others, `file[key]` and `file[key]:line` in JSON
    files that are one object. `filled` counts nulls inside nested values that Arrow had filled in and that were
    left out.
    """

    values: dict[str, Any]
    origin: str
    filled: int = 0


class BadRecord(NamedTuple):
    """A record that cannot be read."""

    origin: str
    reason: str


class Records(list[Record | BadRecord]):
    """The records of one source, and in `notes` what the reader decided for itself, a line each."""

    def __init__(self, records: Iterable[Record | BadRecord] = (), notes: Iterable[str] = ()):
        super().__init__(records)
        self.notes = list(notes)
