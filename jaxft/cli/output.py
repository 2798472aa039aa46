"""Keeps a command alive when its output cannot be written.

The reader of a pipe may leave (`| head`), a terminal may close, the disk behind a log may be full, and a console may
not know a character. A run is worth more than its messages. Messages are lost, with one notice if possible, or are
written with escapes (`\\u27e6`), and the run goes on.
"""

import io
import os
import select
import sys
from contextlib import suppress
from typing import TextIO


class Enduring(io.FileIO):
    """A file that drops output that its descriptor cannot write.

    Args:
        descriptor: 1 or 2; it stays open when this is closed.
        name: what messages call it.
    """

    def __init__(self, descriptor: int, name: str):
        super().__init__(descriptor, "wb", closefd=False)
        self._called, self._lost = name, False

    def write(self, data: memoryview) -> int:
        try:
            while (written := super().write(data)) is None:  # a pipe that does not wait, and is full
                select.select([], [self], [])
        except OSError as error:
            if not self._lost:
                self._lost = True
                word = f"WARNING: {self._called} is lost ({error.strerror}); the command goes on without it\n"
                with suppress(OSError):  # the other one may be lost, too
                    os.write(3 - self.fileno(), word.encode())
            return memoryview(data).nbytes
        return written


def endure() -> None:
    """Make stdout and stderr `Enduring`; call this before anything is printed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened would take its place, and what is printed
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _enduring(1, "stdout", sys.stdout)
    sys.stderr = _enduring(2, "stderr", sys.stderr)


def _enduring(descriptor: int, name: str, stream: TextIO | None) -> TextIO:
    at_once = descriptor == 2 or (stream is not None and (stream.line_buffering or stream.write_through))
    return io.TextIOWrapper(
        io.BufferedWriter(Enduring(descriptor, name)),
        encoding="utf-8" if stream is None else stream.encoding,
        errors="backslashreplace",
        line_buffering=at_once,
    )
