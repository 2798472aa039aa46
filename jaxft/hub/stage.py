"""Directories that appear complete or not at all, and what a kill leaves of them.

Files are written into a directory beside the place where they belong, whose name begins with a dot and ends in `.tmp`.
While its process lives it holds a lock on it, which the kernel releases when the process dies. So a directory without
a lock is what a killed process left, and whoever next writes to the same place removes it.
"""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxft.hub.safetensors_writer import sync_directory
from jaxft.limits import is_full, write_error, writing


@contextmanager
def staged(output: Path, replace: bool = False) -> Iterator[Path]:
    """A directory to write into, which comes to be at `output` when all is written, or not at all.

    Where a link leads from there is where it comes to be.

    Raises:
        ValueError: something is there, and it is not to be replaced.
        OSError: nothing can be written there, or the disk is full; names `output`.
    """
    output = output.expanduser().resolve()
    if not replace and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} is {'not empty' if output.is_dir() else 'a file'}; choose another --output")
    if file := next((part for part in output.parents if part.exists() and not part.is_dir()), None):
        raise ValueError(f"{output} cannot be written: {file} is a file; choose another --output")
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(output.parent, f".{output.name}.", output) as stage:
        yield stage
        if replace and output.exists():
            shutil.rmtree(output)
        os.replace(stage, output)


@contextmanager
def staged_in(directory: Path) -> Iterator[Path]:
    """A place to write files, which take their place in `directory` when the block ends, and vanish if it fails."""
    directory.mkdir(parents=True, exist_ok=True)
    with _temporary(directory, ".jaxft.", directory) as stage:
        yield stage
        for entry in sorted(stage.iterdir()):
            target = directory / entry.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(entry, target)
    sync_directory(directory)


def clear_stale(directory: Path, prefix: str = ".") -> list[Path]:
    """Remove what processes that were killed left in `directory`; returns what there was."""
    removed = []
    for path in directory.iterdir() if directory.is_dir() else ():
        if not path.name.startswith(prefix) or not re.fullmatch(r"\..+\.[0-9a-z_]{8}\.tmp", path.name):
            continue
        if path.is_dir() and not path.is_symlink() and (lock := _lock(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
            removed.append(path)
    return removed


@contextmanager
def _temporary(parent: Path, prefix: str, output: Path) -> Iterator[Path]:
    """A locked directory in `parent`, gone afterwards, with what is in it unless it was moved away."""
    clear_stale(parent, prefix)
    stage, lock = _locked_directory(parent, prefix, output)
    try:
        yield stage
    except OSError as error:
        if not is_full(error):
            raise
        while isinstance(error.__cause__, OSError):  # told already, with the name of a directory inside this one
            error = error.__cause__
        raise OSError(error.errno, f"{output} could not be written: {write_error(error)}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # what cannot be removed now is removed by `clear_stale`
        if lock is not None:
            os.close(lock)


def _locked_directory(parent: Path, prefix: str, output: Path) -> tuple[Path, int | None]:
    while True:
        stage = parent / f"{prefix}{secrets.token_hex(4)}.tmp"
        with writing(output):
            stage.mkdir()
        lock = _lock(stage, wait=True)
        if stage.exists():  # else `clear_stale` of another process came between
            return stage, lock
        if lock is not None:
            os.close(lock)


def _lock(directory: Path, wait: bool = False) -> int | None:
    """An open descriptor that holds the lock; None: another process has it, or this file system has no such locks."""
    descriptor = None
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor
