import gzip
import os
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from jaxft.data.sources import read
from jaxft.data.strict_json import parse_json


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_saved_datasets(tmp_path):
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "two")
    assert [record.values["text"] for record in read(str(tmp_path / "one"))] == ["a", "b"]
    assert [record.values["text"] for record in read(str(tmp_path / "two"))] == ["a", "b"]
    assert [r.values["text"] for r in read(str(tmp_path / "two"), split="test")] == ["b"]
    assert [r.values["text"] for r in read(str(tmp_path / "one"), max_examples=1)] == ["a"]
    with pytest.raises(ValueError, match=r"no split 'val'; there are: train, test"):
        read(str(tmp_path / "two"), split="val")
    with pytest.raises(ValueError, match=r"has no split 'test'"):
        read(str(tmp_path / "one"), split="test")


def test_a_saved_dataset_is_read_as_it_lies_there(tmp_path):
    """Whatever rows were chosen, and whatever format its owner last looked at it in."""
    rows = datasets.Dataset.from_list([{"n": number, "t": str(number)} for number in range(5)])
    chosen = rows.select([3, 1]).with_format("numpy", columns=["n"])
    chosen.save_to_disk(tmp_path / "saved")
    assert [record.values for record in read(str(tmp_path / "saved"))] == [{"n": 3, "t": "3"}, {"n": 1, "t": "1"}]


def test_a_damaged_saved_dataset(tmp_path):
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match=r"saved: a saved dataset that cannot be read: "):
        read(str(tmp_path / "saved"))


def lines(*values: int) -> str:
    return "".join(f'{{"a": {value}}}\n' for value in values)


def test_a_pattern_reads_all_its_files_in_order(tmp_path, monkeypatch):
    for name, values in [("b", [3, 4]), ("a", [1, 2]), ("c", [5])]:
        write(tmp_path / "shards" / f"{name}.jsonl", lines(*values))
    write(tmp_path / "shards" / ".hidden.jsonl", lines(9))
    pattern = str(tmp_path / "shards" / "*.jsonl")
    found = read(pattern)
    assert [record.values["a"] for record in found] == [1, 2, 3, 4, 5]
    origins = [
        f"{tmp_path}/shards/{place}" for place in ("a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:2", "c.jsonl:1")
    ]
    assert [record.origin for record in found] == origins
    assert found.notes == [f"{pattern}: 3 files: a.jsonl, b.jsonl, c.jsonl"]
    assert [record.values["a"] for record in read(pattern, max_examples=3)] == [1, 2, 3]
    assert [record.values["a"] for record in read(str(tmp_path / "**" / "[ab].jsonl"))] == [1, 2, 3, 4]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(read("~/shards/?.jsonl")) == 5
    assert len(read("~/shards/a.jsonl")) == 2


def test_a_pattern_over_tables_and_packed_files(tmp_path):
    for number in range(3):
        table = pyarrow.table({"a": [number]})
        pyarrow.parquet.write_table(table, tmp_path / f"train-{number:05}-of-00003.parquet")
    assert [record.values["a"] for record in read(str(tmp_path / "train-*.parquet"))] == [0, 1, 2]
    write(tmp_path / "x.csv", "a\n1\n")
    write(tmp_path / "y.CSV.gz", gzip.compress(b"a\n2\n"))
    assert [record.values["a"] for record in read(str(tmp_path / "[xy].*"))] == ["1", "2"]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    assert len(read(write(tmp_path / "data[1].jsonl", lines(1)))) == 1


@pytest.mark.parametrize(
    "names, pattern, reason",
    [
        (["a.jsonl", "b.csv"], "*", r"files of several kinds: .jsonl \(1\), .csv \(1\)"),
        (["a.jsonl", "README.md"], "*", r"several kinds: .md \(1\), .jsonl \(1\)"),
        (["a.jsonl", "LICENSE"], "*", r"several kinds: no suffix \(1\), .jsonl \(1\)"),
        (["a.parquet"], "*.jsonl", "no file matches this pattern$"),
        (["x/a.jsonl", "y/b.jsonl"], "*", "no file matches this pattern; it matches directories: .*x, .*y"),
        (
            ["train-0.jsonl", "test-0.jsonl"],
            "*.jsonl",
            "files of several splits: test-0.jsonl, train-0.jsonl; give each",
        ),
        (["train/0.jsonl", "validation/0.jsonl"], "**/*.jsonl", "files of several splits"),
        (["x_train.jsonl", "x_dev.jsonl", "more.jsonl"], "*.jsonl", "files of several splits"),
    ],
)
def test_patterns_that_mix_or_miss(tmp_path, names, pattern, reason):
    for name in names:
        write(tmp_path / name, lines(1))
    with pytest.raises(ValueError, match=reason):
        read(str(tmp_path / pattern))


def test_names_that_only_begin_like_a_split_may_be_read_together(tmp_path):
    for name in ("training.jsonl", "developers.jsonl", "tests.jsonl"):
        write(tmp_path / "test" / name, lines(1))
    assert len(read(str(tmp_path / "test" / "*.jsonl"))) == 3


@pytest.mark.parametrize(
    "names, advice",
    [
        (["a.jsonl", "b.jsonl"], [r"dir/\*\.jsonl\. ", "It holds a.jsonl, b.jsonl$"]),
        (["train-0.parquet", "test-0.parquet"], [r"dir/test\*\.parquet or \S*dir/train\*\.parquet\. "]),
        (["data/train-0.parquet", "README.md", ".git/x.json"], [r"dir/data/train\*\.parquet\. It holds data/train-0"]),
        (["a.jsonl.gz"], [r"dir/\*\.jsonl\.gz"]),
        (["model.safetensors", "x.txt"], ["it holds model.safetensors, x.txt$"]),
        ([f"{number:02}.csv" for number in range(13)], [r"09\.csv and 3 more$"]),
    ],
)
def test_a_directory_is_refused_with_the_pattern_to_use(tmp_path, names, advice):
    for name in names:
        write(tmp_path / "dir" / name, lines(1))
    for part in advice:
        with pytest.raises(ValueError, match=r"dir: a directory that `datasets.save_to_disk` did not write; .*" + part):
            read(str(tmp_path / "dir"))


def test_an_empty_directory(tmp_path):
    with pytest.raises(ValueError, match=r"did not write; it is empty$"):
        read(str(tmp_path))


def packed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)  # a test's name, made of this, must be the same in every worker


@pytest.mark.parametrize(
    "name, data, reason",
    [
        ("a.txt", "two\nlines", r'plain text does not say where an example ends.*as in {"text": "..."}'),
        ("README.MD", "# words", "plain text"),
        ("a.txt", '{"a": 1}\n{"a": 2}', r"looks like JSON; let its name end in \.jsonl"),
        ("noname", ' \n[{"a": 1}]', "looks like JSON"),
        ("a.yaml", "a: 1", r"unknown kind of file; a source ends in one of \.jsonl, .*\.parquet.*packed \(\.gz"),
        ("a.gz", packed(b'{"a": 1}'), "its name does not say what is in it; let it end in .jsonl.gz or .csv.gz"),
        ("a.parquet.gz", packed(b"PAR1"), "unpack it"),
        ("a.tar.gz", packed(b"a"), "a tar archive; unpack it"),
        ("a.TGZ", packed(b"a"), "a tar archive; unpack it"),
    ],
)
def test_kinds_of_files_that_are_not_read(tmp_path, name, data, reason):
    with pytest.raises(ValueError, match=rf"{name}: {reason}"):
        read(write(tmp_path / name, data))


def test_paths_that_lead_nowhere(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"gone\.jsonl: no such file"):
        read("gone.jsonl")
    with pytest.raises(ValueError, match=r"gone\.CSV\.gz: no such file"):
        read("data/gone.CSV.gz")
    for path in ("~/gone", "~nobody-here/gone"):
        with pytest.raises(ValueError, match=rf"{path}: no such file"):
            read(path)
    for address in ("s3://bucket/a.jsonl", "https://host/a.parquet", "hf://datasets/org/name"):
        with pytest.raises(ValueError, match=rf"{address}: addresses are not read; download the file"):
            read(address)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "moved.jsonl")
    with pytest.raises(ValueError, match=r"link\.jsonl: a link to .*moved\.jsonl, which does not exist"):
        read(str(tmp_path / "link.jsonl"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe: a pipe or device; write what it gives to a file"):
        read(str(tmp_path / "pipe"))
    with pytest.raises(ValueError, match=r"cannot be read: File name too long"):
        read("/" + "a" * 300 + ".jsonl")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r'load_dataset\("org/name", "main", split="test"\)\.save_to_disk'):
        read("org/name", name="main", split="test")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_files_have_no_subsets_and_files_of_rows_no_splits(tmp_path, name):
    path = write(tmp_path / name, lines(1, 2))
    with pytest.raises(ValueError, match=r"a file has no split 'test'"):
        read(path, split="test")
    for place in (path, str(tmp_path / "*"), str(tmp_path)):
        with pytest.raises(ValueError, match=r"`name` is the subset of a hub dataset"):
            read(place, name="main")


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
    for text, problem in {
        "NaN": "NaN is not JSON",
        "[-Infinity]": "-Infinity is not JSON",
        '{"a": 1, "a": 1}': "key 'a' is there twice",
        "1 2": "more after the end of the value, from column 3 on",
        "": "Expecting value",
        "{'a': 1}": "Expecting property name",
    }.items():
        with pytest.raises(ValueError, match=problem):
            parse_json(text)
