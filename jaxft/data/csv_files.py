"""CSV and TSV files: a header, and rows of as many fields.

A row with another number of fields is a fault of that row. A fault of quoting is one of the file: where the
field was meant to end cannot be told, so what follows might be read as other rows than were written.
"""

import csv
import shlex
from collections.abc import Iterator
from pathlib import Path

from jaxft.data.records import BadRecord, Record
from jaxft.data.text_files import Utf8, open_text

DELIMITERS = {".csv": ",", ".tsv": "\t"}
LONGEST_FIELD = 2**31 - 1  # characters; all that a C long holds everywhere
_OTHERS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}


def read_csv(path: Path, shown: str, delimiter: str) -> Iterator[Record | BadRecord]:
    """The records of a file of rows; all values are text."""
    csv.field_size_limit(LONGEST_FIELD)  # of the process; the default is shorter than a long document
    utf8 = Utf8(shown)
    with open_text(path, shown, newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] = []
        line = 1
        try:
            for row in rows:
                origin, line = f"{shown}:{line}", rows.line_num + 1
                if not row or row == ["\x1a"]:  # the end-of-file of DOS
                    continue
                fault = utf8.fault("".join(row), origin)
                if not header:
                    utf8.finish()
                    header = row
                    _check(header, origin, shown, delimiter)
                elif fault:
                    yield BadRecord(origin, fault)
                elif len(row) != len(header):
                    reason = f"{len(row)} fields, but the header has {len(header)}: {', '.join(header)}"
                    yield BadRecord(origin, reason)
                else:
                    yield Record(dict(zip(header, row, strict=True)), origin)
        except csv.Error as error:
            advice = "a quoted field does not end as it should; write a quote inside of one twice"
            raise ValueError(f"{shown}:{line}: {error}: {advice}") from None
        if not header:
            raise ValueError(f"{shown}: the file is empty")
    utf8.finish()


def _check(header: list[str], origin: str, shown: str, delimiter: str) -> None:
    if header[0].lstrip().startswith(("{", "[")):
        raise ValueError(f"{origin}: looks like JSON; let its name end in .jsonl or .json")
    if header.count("") > 1:
        raise ValueError(f"{origin}: {header.count('')} columns have no name: {', '.join(header)}; delete or name them")
    if len(set(header)) < len(header):
        raise ValueError(f"{origin}: a column is there twice: {', '.join(header)}")
    if len(header) > 1:
        return
    if header[0].lower().startswith("sep="):
        raise ValueError(f"{origin}: {header[0]!r} is a word to Excel, not a header; save the file with commas instead")
    for other, name in _OTHERS.items():
        if other in header[0] and other != delimiter:
            program = f"import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter={other!r}))"
            advice = f'save it with commas, or: python -c "{program}" < {shlex.quote(shown)} > commas.csv'
            found = f"the header is one column, {header[0]!r}: it looks separated by {name}"
            raise ValueError(f"{origin}: {found}; {advice}")
