import csv
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.data.records import BadRecord
from jaxft.data.sources import read


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


def test_csv(tmp_path):
    path = write(tmp_path / "data.csv", '\nq,a\n"one, with\na line end",1\n\n"say ""hi""",2\n\x1a')
    assert [(r.values, r.origin) for r in read(path)] == [
        ({"q": "one, with\na line end", "a": "1"}, f"{path}:3"),
        ({"q": 'say "hi"', "a": "2"}, f"{path}:6"),
    ]
    assert read(write(tmp_path / "data.TSV", "q\ta\nx, y\t1\n"))[0].values == {"q": "x, y", "a": "1"}
    assert [r.origin for r in read(path, max_examples=1)] == [f"{path}:3"]


def test_a_field_may_be_as_long_as_a_book(tmp_path):
    before = csv.field_size_limit(131072)
    book = "word " * 40_000
    try:
        assert read(write(tmp_path / "data.csv", f'q,a\n"{book}",1\n'))[0].values == {"q": book, "a": "1"}
    finally:
        csv.field_size_limit(before)


def test_rows_of_another_number_of_fields_are_bad_records(tmp_path):
    path = write(tmp_path / "data.csv", 'q,a\n1,2\n3\n"4\n5",6\n7,8,9\n10,\n')
    found = read(path)
    assert [record for record in found if isinstance(record, BadRecord)] == [
        BadRecord(f"{path}:3", "1 fields, but the header has 2: q, a"),
        BadRecord(f"{path}:6", "3 fields, but the header has 2: q, a"),
    ]
    good = [record.values for record in found if not isinstance(record, BadRecord)]
    assert good == [{"q": "1", "a": "2"}, {"q": "4\n5", "a": "6"}, {"q": "10", "a": ""}]


@pytest.mark.parametrize(
    "text, line, reason",
    [
        ("q,q\n1,2\n", 1, "a column is there twice: q, q"),
        ("q,a,,\n1,2,,\n", 1, "2 columns have no name: q, a, , ; delete or name them"),
        ('{"q": 1, "a": 2}\n{"q": 3, "a": 4}\n', 1, "looks like JSON; let its name end in .jsonl"),
        ('q,a\n"open,2\n', 2, "unexpected end of data: a quoted field does not end"),
        ('q,a\n1,2\n"x"y,2\n3,4\n', 3, "',' expected after '\"': a quoted field does not end"),
    ],
)
def test_bad_csv(tmp_path, text, line, reason):
    path = write(tmp_path / "data.csv", text)
    with pytest.raises(ValueError, match=rf"{path}:{line}: .*{reason}"):
        read(path)


@pytest.mark.parametrize("text", ["", "\n\n", "\x1a", "q,a\n"])
def test_empty_csv(tmp_path, text):
    with pytest.raises(ValueError, match=r"data\.csv: (the file is empty|there are no records)"):
        read(write(tmp_path / "data.csv", text))


@pytest.mark.parametrize(
    "name, text, looks",
    [
        ("a.csv", "q;a\n1,5;2\n", "semicolons"),
        ("a.csv", "q\ta\n1\t2\n", "tabs"),
        ("a.csv", "q|a\n1|2\n", "bars"),
        ("a.tsv", "q,a\n1,2\n", "commas"),
    ],
)
def test_other_separators_are_refused_with_a_way_out(tmp_path, name, text, looks):
    path = write(tmp_path / name, text)
    with pytest.raises(ValueError, match=rf"{path}:1: the header is one column, .*separated by {looks}; ") as caught:
        read(path)
    command = str(caught.value).split(", or: ")[1].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert read(str(tmp_path / "commas.csv"))[0].values.keys() == {"q", "a"}


def test_a_word_to_excel_is_no_header(tmp_path):
    with pytest.raises(ValueError, match=r"a\.csv:1: 'sep=;' is a word to Excel"):
        read(write(tmp_path / "a.csv", "sep=;\nq;a\n1;2\n"))


def test_one_column_needs_no_separator(tmp_path):
    assert [r.values for r in read(write(tmp_path / "a.csv", 'text\na; b\n"c, d"\n'))] == [
        {"text": "a; b"},
        {"text": "c, d"},
    ]
