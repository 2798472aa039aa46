import gzip
import json
import re
import tracemalloc
from pathlib import Path

import pytest

from jaxft.data.records import BadRecord, Record
from jaxft.data.sources import read

RECORDS = [{"a": "one\u2028two\u0085", "b": 1}, {"a": "zwei", "b": None}, {"a": "三", "b": [1.5, {"c": True}]}]


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def faults(path: str) -> list[tuple[str, str]]:
    """Where and why, of the records that cannot be read."""
    return [(bad.origin.removeprefix(path), bad.reason) for bad in read(path) if isinstance(bad, BadRecord)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".ndjson", ".JSONL", ".jsonl.gz", ".Json.GZ"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n \n"])
@pytest.mark.parametrize("line_end", ["\r\n", "\n", "\r"])
def test_lines(tmp_path, suffix, start, line_end):
    text = start + line_end.join(json.dumps(record, ensure_ascii=False) for record in RECORDS) + "\n\n"
    data = gzip.compress(text.encode()) if suffix.lower().endswith("gz") else text
    path = write(tmp_path / f"data{suffix}", data)
    found = read(path)
    assert [record.values for record in found] == RECORDS
    first = 1 + start.count("\n")
    assert [record.origin for record in found] == [f"{path}:{first + i}" for i in range(3)]
    assert found.notes == []


@pytest.mark.parametrize("end", ["\x1a", "\n\x1e", "\n\x1a", "\n\x1a\n", "\n\ufeff\n"])
def test_marks_that_programs_leave_are_no_records(tmp_path, end):
    lines = '{"a": 1}\n\ufeff{"a": 2}'  # two files joined, each with its mark
    assert [record.values["a"] for record in read(write(tmp_path / "a.jsonl", lines + end))] == [1, 2]
    assert [record.values["a"] for record in read(write(tmp_path / "a.json", '[{"a": 1}, {"a": 2}]' + end))] == [1, 2]


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_knows_its_lines(tmp_path, indent):
    path = write(tmp_path / "data.json", "\n" + json.dumps(RECORDS, indent=indent) + "\n")
    found = read(path)
    assert [record.values for record in found] == RECORDS
    lines = Path(path).read_text().split("\n")
    starts = [number for number, line in enumerate(lines, 1) if line == "  {"] if indent else [2, 2, 2]
    assert [record.origin for record in found] == [f"{path}:{number}" for number in starts]


@pytest.mark.parametrize(
    "text, bad",
    [
        ('{"a": 1}\n{"a": 2', {2: "not JSON: Expecting ',' delimiter .column 8.; the file ends in this line"}),
        ('{"a": 1}\n{"a": 2\n{"a": 3}', {2: "not JSON: Expecting ',' delimiter .column 8.$"}),
        (
            '{"a": 1}\n[1]\n"text"\n5\ntrue\nnull',
            {2: "not an array", 3: "not a string", 4: "not a number", 5: "not true", 6: "not null"},
        ),
        ('{"a": 1}\n\n{"a": NaN}\n{"a": -Infinity}', {3: "NaN is not JSON", 4: "-Infinity is not JSON"}),
        ('{"a": 1, "b": {"c": 1, "c": 2}}\n{"a": 1}', {1: "key 'c' is there twice"}),
        (
            '{"a": 1} {"a": 2}\n{"a": 1}',
            {1: "there is more after the end of the value, from column 10 on: '{\"a\": 2}'"},
        ),
        (
            '{"a": "\\ud83d"}\n{"a": "\\ud83d\\ude00"}\n{"a": "\\ude00 \\\\ud83d"}',
            {1: "half of a surrogate", 3: r"\\ude00 is half"},
        ),
        ('{"a": 1\n{"a": 2\n{"b": 1}\n{"c": 1}', {1: "Expecting", 2: "Expecting"}),
        ('{"a": 1}\n' + '{"a": ' * 3000, {2: "too deeply nested|Expecting"}),
        ('{"a": ' + "9" * 5000 + '}\n{"a": 1}', {1: "a number of more digits than can be read"}),
        ('[{"a": ' + "9" * 5000 + '},\n{"a": 1}]', {1: "a number of more digits than can be read"}),
        ("{'a': 1}\n{\"a\": 1}", {1: "not JSON: .*JSON has double quotes"}),
        (
            b'{"a": "\xc3\xb6"}\n{"a": "\xff"}\n{"a": "cut \xe4\xb8"}',
            {2: "not UTF-8 .byte 0xff.", 3: "not UTF-8 .byte 0xe4."},
        ),
        (
            '[{"a": 1},\n{"a": 2, "a": 3},\n{"a": NaN},\n["nested"],\n{"a": 4}]',
            {2: "key 'a' is there twice", 3: "NaN", 4: "not an array"},
        ),
        (b'[{"a": "\xc3\xb6"},\n{"a": "\xff"}]', {2: "not UTF-8"}),
    ],
)
def test_bad_records_are_all_named_and_the_others_read(tmp_path, text, bad):
    path = write(tmp_path / "data.jsonl", text)
    assert [where for where, _ in faults(path)] == [f":{line}" for line in bad]
    for (_, reason), pattern in zip(faults(path), bad.values(), strict=True):
        assert re.search(pattern, reason), reason
    assert any(isinstance(record, Record) for record in read(path))


@pytest.mark.parametrize(
    "text, line, reason",
    [
        ('[{"a": 1},\n{"a": }]', 2, "not JSON: Expecting value"),
        ('[{"a": 1}\n{"a": 2}]', 2, "expected ',' and a record, or ']'"),
        ('[{"a": 1},\n]', 2, "expected ',' and a record"),
        ('[{"a": 1},\n{"a": 2}', 2, "expected ',' and a record, or ']'"),
        ('[{"a": 1}]\n{"a": 2}', 2, "more after the end of the array; write one object per line: jq -c"),
        ('[{"a": 1}]\n[]', 2, 'more after the end of the array; a record must be an object, as in {"messages"'),
        ('[{"a": 1}] x', 1, "more after the end of the array$"),
        ('{"a": 1} {"a": 2}', 1, "more after the end of the object; write one object per line: jq -c"),
        ('{\n"a": 1\n}\n{\n"a": 2\n}', 4, "more after the end of the object; write one object per line: jq -c"),
        ('{"a": 1},\n{"a": 2}', 1, "a comma; put . before all"),
        ('{\n"a": 1,\n"a": 2}', 3, "key 'a' is there twice"),
        ('{\n"a": 1\n"b": 2}', 3, "expected ',' and a key"),
        ('{\n"a": 1,\n}', 3, "expected ',' and a key"),
        ('{\n"a" 1}', 2, "expected a key in double quotes and ':'"),
        ("{\n1: 1}", 2, "expected a key in double quotes and ':'"),
        ("{\n'a': 1}", 2, "JSON has double quotes"),
        ('{"a": ' * 3000, 1, "too deeply nested|Expecting"),
        ('[{"a": 1},\n{"a": "x', 2, "Unterminated string.*may be cut off$"),
        ('{"data": [{"a": 1},\n{"a": 2', 2, "may be cut off$"),
        (b'{"a": "ok"}\n{"a": "\xff"}', 2, "not UTF-8 .byte 0xff."),
    ],
)
def test_where_nothing_more_can_be_told_the_file_is_refused(tmp_path, text, line, reason):
    path = write(tmp_path / "data.jsonl", text)
    with pytest.raises(ValueError, match=rf"{path}:{line}: .*({reason})"):
        read(path)


@pytest.mark.parametrize("text", ["", "\n\n", "[]", "[ ]", "\ufeff", "\x1a"])
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_empty_files(tmp_path, text, name):
    with pytest.raises(ValueError, match=r"data\.jsonl?: (the file is empty|there are no records)"):
        read(write(tmp_path / name, text))


@pytest.mark.parametrize("packed", [False, True])
def test_no_more_lines_are_read_than_are_asked_for(tmp_path, packed):
    line = json.dumps({"prompt": "p" * 1000, "completion": "c" * 1000}) + "\n"
    data = (line * 5000 + "damaged").encode()  # 10 MB
    path = write(tmp_path / ("data.jsonl" + ".gz" * packed), gzip.compress(data)[:-9] if packed else data)
    tracemalloc.start()
    try:
        found = read(path, max_examples=7)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert [record.origin for record in found] == [f"{path}:{line}" for line in range(1, 8)]


def test_no_more_of_an_array_is_parsed_than_is_asked_for(tmp_path):
    path = write(tmp_path / "data.json", '[{"a": 1},\n{"a": 2},\n{"a": oops')
    assert [record.origin for record in read(path, max_examples=2)] == [f"{path}:1", f"{path}:2"]
    with pytest.raises(ValueError, match=r"data\.json:3: not JSON"):
        read(path, max_examples=3)


def test_a_file_of_lines_has_no_splits(tmp_path):
    for name, text in [("a.jsonl", '{"a": 1}\n{"a": 2}'), ("a.json", '[{"a": 1}]'), ("b.json", '{"a": 1}')]:
        path = write(tmp_path / name, text)
        assert len(read(path, split="train")) == text.count("{")
        with pytest.raises(ValueError, match=rf"{name}: a file has no split 'test'; remove `split`"):
            read(path, split="test")
