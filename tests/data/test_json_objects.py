import gzip
import json
from pathlib import Path

import pytest

from jaxft.data.records import BadRecord
from jaxft.data.sources import read

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}, {"prompt": "e", "completion": "f"}]
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write(tmp_path: Path, value, indent=None) -> str:
    path = tmp_path / "data.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=indent))
    return str(path)


@pytest.mark.parametrize("indent", [None, 1])
def test_lists_by_split(tmp_path, indent):
    path = write(tmp_path, {"test": ROWS[2:], "train": ROWS[:2], "version": 1}, indent)
    found = read(path)
    assert [record.values for record in found] == ROWS[:2]
    assert found.notes == [f"{path}: read the list under `train`; not read: test, version"]
    assert read(path, split="train") == found
    lines = [number for number, line in enumerate(Path(path).read_text().split("\n"), 1) if line == "  {"]
    assert [record.origin for record in found] == [f"{path}[train]:{n}" for n in (lines[1:] if indent else [1, 1])]
    assert [record.values for record in read(path, split="test")] == ROWS[2:]
    assert [record.values for record in read(path, max_examples=1)] == ROWS[:1]
    with pytest.raises(ValueError, match=r"data\.json: a file has no split 'val'; there are: test, train"):
        read(path, split="val")


@pytest.mark.parametrize(
    "key, beside", [("data", {}), ("rows", {"version": "1.1", "n": [1, 2]}), ("conversations", {})]
)
@pytest.mark.parametrize("indent", [None, 2])
def test_the_only_list_of_records(tmp_path, key, beside, indent):
    path = write(tmp_path, {**beside, key: ROWS}, indent)
    found = read(path)
    assert [record.values for record in found] == ROWS
    left = f"; not read: {', '.join(beside)}" if beside else ""
    assert found.notes == [f"{path}: read the list under `{key}`{left}"]
    assert read(path, split=key) == found


@pytest.mark.parametrize("ids", [["a", "b", "c"], ["0", "1", "2"], ["10", "2", "x y"]])
@pytest.mark.parametrize("indent", [None, 2])
def test_records_by_id(tmp_path, ids, indent):
    path = write(tmp_path, dict(zip(ids, ROWS, strict=True)), indent)
    found = read(path)
    assert [(record.values, record.origin) for record in found] == [
        (row, f"{path}[{id}]") for id, row in zip(ids, ROWS, strict=True)
    ]
    assert found.notes == [f"{path}: read as records by id, as in {ids[0]!r}"]


def test_records_by_id_may_differ_in_their_keys(tmp_path):
    rows = {"x": {"prompt": "a", "completion": "b"}, "y": {"prompt": "c", "completion": "d", "source": None}}
    assert [record.values for record in read(write(tmp_path, rows))] == list(rows.values())


@pytest.mark.parametrize(
    "columns",
    [
        {key: [row[key] for row in ROWS] for key in ROWS[0]},
        {key: {str(i): row[key] for i, row in enumerate(ROWS)} for key in ROWS[0]},
        {key: {str(i): row[key] for i, row in zip((17, 0, 4), ROWS, strict=True)} for key in ROWS[0]},
    ],
    ids=["lists", "objects", "objects of chosen rows"],
)
def test_columns(tmp_path, columns):
    path = write(tmp_path, columns)
    found = read(path)
    first = columns["prompt"]
    names = first if isinstance(first, dict) else range(3)
    assert [(record.values, record.origin) for record in found] == [
        (row, f"{path}[{name}]") for name, row in zip(names, ROWS, strict=True)
    ]
    assert found.notes == [f"{path}: read as columns: prompt, completion"]


def test_columns_of_conversations(tmp_path):
    path = write(tmp_path, {"messages": [TURNS, TURNS[:1]], "id": [1, None]})
    assert [record.values for record in read(path)] == [
        {"messages": TURNS, "id": 1},
        {"messages": TURNS[:1], "id": None},
    ]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS},
        {"messages": TURNS, "tools": [{"type": "function"}], "ids": [{"a": 1}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "system": "s"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"instruction": "a", "output": "b", "history": [["c", "d"]]},
        {"prompt": "a", "completion": "b", "tools": [{"type": "function"}]},
        {"text": "a", "meta": {"b": 1}},
        {"messages": [{"author": "a", "text": "hi"}, {"author": "b", "text": "hello"}]},
        {"dialogue": [{"speaker": "a", "content": "hi"}], "chat": [{"user": "b", "message": "hi"}]},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_one_record(tmp_path, record, indent):
    path = write(tmp_path, record, indent)
    found = read(path)
    assert (found[0].values, found[0].origin, len(found)) == (record, f"{path}:1", 1)
    assert found.notes == []


@pytest.mark.parametrize("name", ["a.jsonl", "A.NDJSON", "a.jsonl.gz"])
@pytest.mark.parametrize(
    "record",
    [
        {"question": "q", "answer": "a", "contexts": [{"title": "t"}]},
        {"text": "t", "entities": [{"start": 0}], "relations": [{"of": 1}]},
        {"translation": {"en": "a", "de": "b"}},
        {"prompt": {"0": "a"}, "completion": {"0": "b"}},
        {"prompt": ["a"], "completion": ["b"]},
    ],
)
def test_a_line_is_a_record_where_the_name_says_lines(tmp_path, name, record):
    data = json.dumps(record).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    found = read(str(tmp_path / name))
    assert [entry.values for entry in found] == [record]
    assert found.notes == []


def test_a_line_that_is_a_list_of_records_is_read_as_one(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"data": ROWS, "n": 3}))
    assert [record.values for record in read(str(tmp_path / "a.jsonl"))] == ROWS


def test_a_held_out_list_is_not_what_was_asked_for_as_train(tmp_path):
    path = write(tmp_path, {"Test": ROWS})
    assert read(path).notes == [f"{path}: read the list under `Test`"]
    with pytest.raises(ValueError, match=r"a file has no split 'train'; there are: Test"):
        read(path, split="train")


@pytest.mark.parametrize(
    "value, reason",
    [
        ({"a": ROWS, "b": ROWS[:1]}, r"lists of objects: a \(3\), b \(1\); name the one to read, as in `split: a`$"),
        ({"features": [{"name": "x"}], "rows": [{"row": {}}]}, "as in `split: features`"),
        ({"train": {}, "test": ROWS, "dev": ROWS}, r"test \(3\), dev \(3\)"),
        (
            {"question": "q", "answer": "a", "contexts": [{"title": "t"}]},
            "`split: contexts`; if the file is one record ",
        ),
        ({"text": "t", "data": ROWS}, r"\(it has text\), put \[ and \] around it"),
        ({"prompt": ["a", "b"], "completion": ["c"]}, "different lengths: prompt has 2, completion has 1"),
        ({"columns": ["a"], "index": [0], "data": [["x"]]}, "orient='split'; write it with orient='records'"),
        (
            {"train": {"1": ROWS[0]}, "test": {"2": ROWS[1]}},
            r"the records are deeper; .* jq '\.train' \S*data.json > train.json",
        ),
        ({"train": {"prompt": ["a"], "completion": ["b"]}}, r"the records are deeper; .* jq '\.train'"),
        ({"data": {"train": ROWS, "test": ROWS}}, r"the records are deeper; .* jq '\.data'"),
        ({"train": [], "test": ROWS}, "there are no records in it"),
    ],
)
def test_what_may_be_read_in_several_ways_or_in_none_is_refused(tmp_path, value, reason):
    with pytest.raises(ValueError, match=r"data\.json: .*" + reason):
        read(write(tmp_path, value))


@pytest.mark.parametrize(
    "text, where",
    [
        ('{"data": [{"a": 1},\n{"a": NaN},\n5,\n{"a": 2}]}', ["[data]:2", "[data]:3"]),
        ('{"x": {"a": 1},\n"y": {"a": 1, "a": 2}}', ["[y]"]),
        ('{"a": [1, NaN],\n"b": [3, 4]}', ["[1]"]),
        ('\n{"text": "a",\n"score": NaN}', [":2"]),
        ('{"data": [{"a": "\\ud83d"},\n{"a": "b"}], "beside": NaN}', ["[data]:1"]),
    ],
)
def test_bad_records_are_named_and_the_others_read(tmp_path, text, where):
    path = write(tmp_path, text)
    bad = [record for record in read(path) if isinstance(record, BadRecord)]
    assert [record.origin.removeprefix(path) for record in bad] == where
    assert all(record.reason for record in bad)
