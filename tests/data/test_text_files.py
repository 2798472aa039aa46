import bz2
import gzip
import io
import lzma
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pytest

from jaxft.data.records import BadRecord
from jaxft.data.sources import read

TEXT = '{"a": "größer 🙂"}\r\n{"a": "naïve"}\r\n'
TABLE = 'a,b\r\ngrößer 🙂,1\r\n"two\r\nlines",2\r\n'


def write(path: Path, data: str | bytes) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


def packed_zip() -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("data.jsonl", TEXT)
    return file.getvalue()


def packed_tar() -> bytes:
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as archive:
        archive.addfile(tarfile.TarInfo("data.jsonl"))
    return file.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_that_a_mark_tells(tmp_path, encoding):
    lines = read(write(tmp_path / "a.jsonl", TEXT.encode(encoding)))
    assert [record.values["a"] for record in lines] == ["größer 🙂", "naïve"]
    assert [record.origin[-2:] for record in lines] == [":1", ":2"]
    rows = read(write(tmp_path / "a.csv", TABLE.encode(encoding)))
    assert [record.values["a"] for record in rows] == ["größer 🙂", "two\r\nlines"]


def test_the_other_order_of_bytes_too(tmp_path):
    assert len(read(write(tmp_path / "a.jsonl", b"\xfe\xff" + TEXT.encode("utf-16-be")))) == 2
    with pytest.raises(ValueError, match=r"a\.csv: begins as UTF-16.*the file is damaged"):
        read(write(tmp_path / "a.csv", TABLE.encode("utf-16")[:-1]))


@pytest.mark.parametrize(
    "suffix, pack", [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)]
)
def test_packed_files(tmp_path, suffix, pack):
    lines = "".join(f'{{"a": "ö{number * 7919 % 10007}"}}\n' for number in range(20000)).encode()
    found = read(write(tmp_path / f"a.jsonl{suffix}", pack(lines)))
    assert (len(found), found[-1].origin[-6:]) == (20000, ":20000")
    assert [r.values["b"] for r in read(write(tmp_path / f"a.CSV{suffix.upper()}", pack(TABLE.encode())))] == ["1", "2"]
    with pytest.raises(ValueError, match=rf"cut\.jsonl{suffix}: a damaged {suffix} file: "):
        read(write(tmp_path / f"cut.jsonl{suffix}", pack(lines)[:-30]))
    with pytest.raises(ValueError, match=rf"no\.jsonl{suffix}: not a {suffix} file; take {suffix} off its name"):
        read(write(tmp_path / f"no.jsonl{suffix}", TEXT))
    with pytest.raises(ValueError, match=rf"no\.jsonl: an? \w+ file; let its name end in {suffix}"):
        read(write(tmp_path / "no.jsonl", pack(lines)))


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n <HTML lang=en>", "a web page"),
        (b"<?xml version='1.0'?>", "XML"),
        (packed_zip(), "a zip file; unpack it .if it is an Excel workbook, save the sheet as CSV"),
        (packed_tar(), "a tar archive; unpack it"),
        (b"7z\xbc\xaf'\x1c\0\4", "a 7z archive; unpack it"),
        (b"%PDF-1.7", "a PDF"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an older Excel"),
        (b"SQLite format 3\0", "an SQLite database"),
        (b"\x80\x04\x95", "pickled objects"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.arrow", "a.xlsx", "noname"])
def test_files_that_are_something_else_are_named(tmp_path, name, data, reason):
    with pytest.raises(ValueError, match=rf"{name}: .*{reason}"):
        read(write(tmp_path / name, data))


@pytest.mark.parametrize(
    "name, text", [("a b.jsonl", TEXT), ("a.json", f"[{TEXT.strip().replace('}', '},', 1)}]"), ("a.csv", TABLE)]
)
@pytest.mark.parametrize(
    "encoding, advice",
    [
        ("cp1252", "looks like Windows-1252; convert it: iconv -f CP1252 -t UTF-8 "),
        ("latin-1", "looks like Windows-1252"),
        ("utf-16-le", "looks like UTF-16LE without a byte order mark; convert it: iconv -f UTF-16LE -t UTF-8 "),
        ("utf-16-be", "looks like UTF-16BE"),
        ("gb18030", "none of UTF-8, UTF-16 and Windows-1252; where it is GB18030 .or SHIFT_JIS, EUC-KR, CP1251., conv"),
        ("shift_jis", "none of UTF-8, UTF-16 and Windows-1252"),
        ("cp1251", "none of UTF-8, UTF-16 and Windows-1252"),
    ],
)
def test_other_encodings_are_refused_with_a_guess(tmp_path, name, text, encoding, advice):
    letters = {"gb18030": "你好世界", "shift_jis": "テストです", "cp1251": "привет мир"}.get(encoding, "größer")
    data = text.replace("größer 🙂", letters).replace("naïve", letters).encode(encoding)
    path = write(tmp_path / name, data)
    with pytest.raises(ValueError, match=rf"{name}.*{advice}"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl", "it's b.csv"])
def test_the_advice_is_there_before_the_end_and_its_command_works(tmp_path, name):
    path = write(tmp_path / name, (TEXT if "json" in name else TABLE).replace("🙂", "").encode("cp1252"))
    (bad,) = read(path, max_examples=1)
    assert isinstance(bad, BadRecord)
    subprocess.run(bad.reason.split("convert it: ")[1], shell=True, check=True)
    assert read(str(tmp_path / f"utf8-{name}"))[0].values["a"] == "größer "


def test_a_damaged_record_among_good_ones_is_a_fault_of_that_record(tmp_path):
    rows = b"a,b\n\xc3\xb6,1\n\xf6,2\n\xe4\xb8,3\n\xc3\xa4,4\n"
    found = read(write(tmp_path / "a.csv", rows))
    assert [(record.origin[-1], isinstance(record, BadRecord)) for record in found] == [
        ("2", False),
        ("3", True),
        ("4", True),
        ("5", False),
    ]
    assert found[1].reason == "not UTF-8 (byte 0xf6)"
    with pytest.raises(ValueError, match=r"b\.csv:1: not UTF-8 .byte 0xf6.; it looks like Windows-1252"):
        read(write(tmp_path / "b.csv", b"gr\xf6\xdfe,b\n1,2\n"), max_examples=1)
