"""The text of a file: what it is packed in, how it is encoded, and whether it is what its name says.

Text is UTF-8, or UTF-16 or UTF-32 if a byte order mark says so. Other encodings are refused with a guess, for a
wrong guess would train on garbled letters. One damaged record in a file of UTF-8 is a fault of that record.
"""

import bz2
import codecs
import gzip
import io
import lzma
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO


def _open_plain(path: Path) -> BinaryIO:
    return path.open("rb")


def _open_zstd(path: Path) -> BinaryIO:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


#: Suffix -> what opens the file, and the bytes with which such a file begins.
PACKED: dict[str, tuple[Callable[[Path], BinaryIO], bytes]] = {
    ".gz": (gzip.open, b"\x1f\x8b"),
    ".bz2": (bz2.open, b"BZh"),
    ".xz": (lzma.open, b"\xfd7zXZ\0"),
    ".zst": (_open_zstd, b"\x28\xb5\x2f\xfd"),
}

_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

_WORDS = {  # in any case of letters
    b"version https://git-lfs": "a git-lfs pointer, not the data; fetch the file with `git lfs pull`",
    b"<!doctype": "a web page, not data; download the raw file",
    b"<html": "a web page, not data; download the raw file",
    b"<?xml": "XML; write one JSON object per line instead",
}
_PICKLE = "pickled objects of Python; write them as JSON, one object per line"
_MAGIC = {
    b"PAR1\x15": "a Parquet file; let its name end in .parquet",
    b"ARROW1\0": "an Arrow file; let its name end in .arrow",
    b"PK\x03\x04": "a zip file; unpack it (if it is an Excel workbook, save the sheet as CSV UTF-8)",
    b"\xd0\xcf\x11\xe0": "a document of an older Excel or Word; save the sheet as CSV UTF-8",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"Rar!": "a rar archive; unpack it",
    b"%PDF-": "a PDF; write its text as JSON, one object per line",
    b"SQLite format 3\0": "an SQLite database; export the table as CSV or JSON",
    b"\x1f\x8b": "a gzip file; let its name end in .gz, as in data.jsonl.gz",
    b"BZh91AY&SY": "a bzip2 file; let its name end in .bz2, as in data.jsonl.bz2",
    b"\xfd7zXZ\0": "an xz file; let its name end in .xz, as in data.jsonl.xz",
    b"\x28\xb5\x2f\xfd": "a zstd file; let its name end in .zst, as in data.jsonl.zst",
    **dict.fromkeys((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), _PICKLE),
}


def kind_of(head: bytes) -> str | None:
    """What a file is that begins with `head`, with what to do, if that is no text that could hold records."""
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it"
    words = head.lstrip().lower()
    found = [kind for start, kind in _WORDS.items() if words.startswith(start)]
    found += [kind for magic, kind in _MAGIC.items() if head.startswith(magic)]
    return found[0] if found else None


def looks_like(head: bytes) -> str | None:
    """What a file is that begins with `head` and was taken for something else; None = cannot be told."""
    if head.lstrip(codecs.BOM_UTF8 + b" \t\r\n")[:1] in (b"{", b"["):
        return "looks like JSON; let its name end in .jsonl or .json"
    return kind_of(head)


def head_of(path: Path) -> bytes:
    """The first bytes of a file, as they lie on disk."""
    with path.open("rb") as file:
        return file.read(512)


@contextmanager
def open_text(path: Path, shown: str, *, newline: str | None) -> Iterator[TextIO]:
    """Open a file to read its text from the start; bytes that are not UTF-8 come as lone surrogates, for `Utf8`.

    Args:
        newline: None = lines end in \\n, \\r or \\r\\n and come with \\n; "" = the same, but as they are.

    Raises:
        ValueError: what the file is, if it holds something else; also from within, where it is damaged.
    """
    suffix, head = path.suffix.lower(), head_of(path)
    opener, magic = PACKED.get(suffix, (_open_plain, b""))
    if head and not head.startswith(magic):
        kind = kind_of(head) or f"not a {suffix} file; take {suffix} off its name if it is not packed"
        raise ValueError(f"{shown}: {kind}")
    try:
        with io.BufferedReader(opener(path)) as file:
            start = file.peek(512)
            if kind := kind_of(start):
                raise ValueError(f"{shown}: {kind}")
            encoding = _encoding(start, shown)
            errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
            with io.TextIOWrapper(file, encoding, errors, newline) as text:
                yield text
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown}: begins as {error.encoding.upper()}, but is not: the file is damaged") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if not magic:
            raise
        raise ValueError(f"{shown}: a damaged {suffix} file: {error}") from None


def _encoding(head: bytes, shown: str) -> str:
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    for first, name in ((0, "UTF-16BE"), (1, "UTF-16LE")):
        if len(head) > 1 and head[first::2].count(0) > len(head) // 4:
            raise ValueError(f"{shown}: looks like {name} without a byte order mark; {_conversion(name, shown)}")
    return "utf-8"


def _conversion(encoding: str, shown: str) -> str:
    if Path(shown).suffix.lower() in PACKED:
        return f"unpack it and convert it from {encoding} to UTF-8"
    source = Path(shown).expanduser()
    target = source.with_name(f"utf8-{source.name}")
    return f"convert it: iconv -f {encoding} -t UTF-8 {shlex.quote(str(source))} > {shlex.quote(str(target))}"


class Utf8:
    """Tells a damaged record in a file of UTF-8 from a file in another encoding.

    A file that has letters beyond ASCII, and none of them right, is in another encoding: to drop its records one
    by one would drop all that have such letters.
    """

    def __init__(self, shown: str):
        self._shown = shown
        self._sound = False
        self._first: str | None = None

    def fault(self, text: str, origin: str) -> str | None:
        """Why `text`, as `open_text` gives it, is not text; None if it is."""
        if text.isascii():
            return None
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"not UTF-8 (byte 0x{ord(text[error.start]) - 0xDC00:02x})"
        else:
            self._sound = True
            return None
        if self._sound or self._first:
            return found
        found = f"{found}; {_advice(text.encode('utf-8', 'surrogateescape'), self._shown)}"
        self._first = f"{origin}: {found}"
        return found

    def finish(self) -> None:
        """At the end of a file: ValueError if it is in another encoding."""
        if self._first and not self._sound:
            raise ValueError(self._first)


_WESTERN = frozenset([0x80, 0x85, *range(0x91, 0x98), 0x99, *range(0xA0, 0x100)])


def _advice(raw: bytes, shown: str) -> str:
    runs = re.findall(rb"[\x80-\xff]+", raw)
    beyond = b"".join(runs)
    if len(beyond) <= 2 * len(runs) and sum(byte in _WESTERN for byte in beyond) > 0.9 * len(beyond):
        return f"it looks like Windows-1252; {_conversion('CP1252', shown)}"
    looks = "it looks like none of UTF-8, UTF-16 and Windows-1252; where it is GB18030 (or SHIFT_JIS, EUC-KR, CP1251)"
    return f"{looks}, {_conversion('GB18030', shown)}"
