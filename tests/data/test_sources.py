import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from jaxft.data.sources import parse_json, read


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


RECORDS = [{"a": "one\u2028two", "b": 1}, {"a": "zwei", "b": None}, {"a": "三", "b": [1.5, {"c": True}]}]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n \n"])
def test_json_lines(tmp_path, suffix, start):
    text = start + "\r\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS) + "\n\n"
    data = gzip.compress(text.encode()) if suffix.endswith("gz") else text
    path = write(tmp_path / f"data{suffix}", data)
    found = read(path)
    assert [record.values for record in found] == RECORDS
    first = 1 + start.count("\n")
    assert [record.origin for record in found] == [f"{path}:{first + i}" for i in range(3)]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_array_knows_its_lines(tmp_path, indent):
    path = write(tmp_path / "data.json", "\n" + json.dumps(RECORDS, indent=indent) + "\n")
    found = read(path)
    assert [record.values for record in found] == RECORDS
    lines = Path(path).read_text().split("\n")
    starts = [number for number, line in enumerate(lines, 1) if line == "  {"] if indent else [2, 2, 2]
    assert [record.origin for record in found] == [f"{path}:{number}" for number in starts]


@pytest.mark.parametrize(
    "text, line, reason",
    [
        ('{"a": 1}\n{"a": 2', 2, "not JSON: Expecting ',' delimiter.*one object per line"),
        ('{"a": 1}\n[1]', 2, "must be an object, not list"),
        ('{"a": 1}\n"text"', 2, "must be an object, not str"),
        ('{"a": 1}\n\n{"a": NaN}', 3, "NaN is not JSON"),
        ('{"a": -Infinity}', 1, "-Infinity is not JSON"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', 1, "key 'c' is there twice"),
        ('{"a": 1} {"a": 2}', 1, "there is more after the end"),
        ('{\n"a": 1\n}', 1, "not JSON.*one object per line, or one array"),
        ('[{"a": 1},\n{"a": }]', 2, "not JSON: Expecting value"),
        ('[{"a": 1},\n{"a": 2, "a": 3}]', 2, "key 'a' is there twice"),
        ('[{"a": 1}\n{"a": 2}]', 2, "expected ',' and a record, or ']'"),
        ('[{"a": 1},\n]', 2, "expected ',' and a record"),
        ('[{"a": 1},\n{"a": 2}', 2, "expected ',' and a record, or ']'"),
        ('[{"a": 1}]\n[]', 1, "more after the end of the array"),
        ('[\n["nested"]]', 2, "must be an object, not list"),
        (b'{"a": "ok"}\n{"a": "\xff"}', 2, "not UTF-8 .byte 0xff."),
        ('{"a": ' * 3000, 1, "too deeply nested|Expecting"),
    ],
)
def test_bad_json_is_an_error_with_its_line(tmp_path, text, line, reason):
    path = write(tmp_path / "data.jsonl", text)
    with pytest.raises(ValueError, match=rf"{path}:{line}: .*({reason})"):
        read(path)


@pytest.mark.parametrize("text", ["", "\n\n", "[]", "[ ]", "\ufeff"])
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_empty_files(tmp_path, text, name):
    with pytest.raises(ValueError, match=r"data\.jsonl?: (the file is empty|there are no records)"):
        read(write(tmp_path / name, text))


@pytest.mark.parametrize(
    "name, data, reason",
    [
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        ("a.json", "<!DOCTYPE html><html>", "a web page"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}' * 100, mtime=0)[:-9], "damaged gzip"),
        ("a.jsonl.gz", b'{"a": 1}', "damaged gzip"),
        ("a.parquet", b"PAR1 not really", "not a readable Parquet file"),
        ("a.txt", b"text", "unknown kind of file; a source ends in one of .jsonl"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, data, reason):
    with pytest.raises(ValueError, match=rf"{name}: .*{reason}"):
        read(write(tmp_path / name, data))


def test_csv(tmp_path):
    path = write(tmp_path / "data.csv", 'q,a\n"one, with\na line end",1\n\n"say ""hi""",2\n')
    assert [(r.values, r.origin) for r in read(path)] == [
        ({"q": "one, with\na line end", "a": "1"}, f"{path}:2"),
        ({"q": 'say "hi"', "a": "2"}, f"{path}:5"),
    ]
    assert read(write(tmp_path / "data.tsv", "q\ta\nx, y\t1\n"))[0].values == {"q": "x, y", "a": "1"}


def test_a_field_may_be_as_long_as_a_book(tmp_path):
    before = csv.field_size_limit(131072)
    book = "word " * 40_000
    try:
        assert read(write(tmp_path / "data.csv", f'q,a\n"{book}",1\n'))[0].values == {"q": book, "a": "1"}
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize(
    "text, line, reason",
    [
        ("q,a\n1,2\n3", 3, "1 fields, but the header has 2: q, a"),
        ("q,a\n1,2,3\n", 2, "3 fields"),
        ("q,q\n1,2\n", 1, "a column is there twice"),
        ("", 1, "the file is empty"),
        ('q,a\n"open,2\n', 2, "unexpected end of data"),
    ],
)
def test_bad_csv(tmp_path, text, line, reason):
    path = write(tmp_path / "data.csv", text)
    with pytest.raises(ValueError, match=rf"{path}:{line}: .*{reason}"):
        read(path)


def test_parquet_and_max_examples(tmp_path):
    path = str(tmp_path / "data.parquet")
    rows = [{"q": f"q{i}", "n": [{"role": "user", "content": str(i)}]} for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [record.values for record in read(path)] == rows
    assert [record.origin for record in read(path, max_examples=2)] == [f"{path}:1", f"{path}:2"]


def test_saved_datasets(tmp_path):
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "two")
    assert [record.values["text"] for record in read(str(tmp_path / "one"))] == ["a", "b"]
    assert [record.values["text"] for record in read(str(tmp_path / "two"))] == ["a", "b"]
    assert [r.values["text"] for r in read(str(tmp_path / "two"), split="test")] == ["b"]
    with pytest.raises(ValueError, match=r"no split 'val'; there are: train, test"):
        read(str(tmp_path / "two"), split="val")
    with pytest.raises(ValueError, match=r"has no split 'test'"):
        read(str(tmp_path / "one"), split="test")
    with pytest.raises(ValueError, match=r"not one that `datasets.save_to_disk` wrote"):
        read(str(tmp_path))


def test_paths_that_lead_nowhere(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"gone\.jsonl: no such file"):
        read("gone.jsonl")
    with pytest.raises(ValueError, match=r"a file has no split 'test'"):
        read(write(tmp_path / "a.jsonl", '{"a": 1}'), split="test")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r'load_dataset\("org/name", "main", split="test"\)\.save_to_disk'):
        read("org/name", name="main", split="test")


def test_no_secret_of_a_hub_error_is_shown(monkeypatch):
    def load_dataset(*_, **__):
        raise OSError("401 for https://me:CaNaRy@host/x?sig=CaNaRy with Bearer CaNaRy and hf_CaNaRyCaNaRy, CaNaRy-own")

    monkeypatch.setenv("HF_TOKEN", "CaNaRy-own")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"org/name: no such file.*401") as caught:
        read("org/name")
    assert "CaNaRy" not in str(caught.value)
    assert caught.value.__suppress_context__, "the traceback would show the hub's own words"


def test_hub_rows_keep_their_origin(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [record.origin for record in read("org/name")] == ["org/name[train]:1", "org/name[train]:2"]
    assert asked == [(("org/name", None), {"split": "train"})]


def test_parse_json_is_strict():
    assert parse_json(' {"a": [1, 2.5e3, null]} \n') == {"a": [1, 2500.0, None]}
    for text in ["NaN", '{"a": 1, "a": 1}', "1 2", "", "{'a': 1}"]:
        with pytest.raises(ValueError):
            parse_json(text)
