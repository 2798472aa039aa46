"""What the system refuses, told as that: memory, not a damaged file, and room on a disk, not an error number.

Python says in four ways that there is no memory: by `MemoryError`, mostly without a word, by the errno ENOMEM of a
file that cannot be mapped, by a library that cannot be, and by a thread that cannot be started.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_NO_THREAD = "can't start new thread"  # Python's word, in a RuntimeError: each thread needs a stack
_NO_LIBRARY = "failed to map segment from shared object"  # the loader's word, in an ImportError or OSError
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class NoMemoryError(MemoryError):
    """No memory for something; the text names it, and the limit that was met."""


@contextmanager
def memory_for(what: object) -> Iterator[None]:
    """Inside, memory that cannot be had is a `NoMemoryError` that names `what`, a file or directory."""
    try:
        yield
    except NoMemoryError:
        raise
    except Exception as error:
        if not is_without_memory(error):
            raise
        raise NoMemoryError(f"{what}: no memory for it: {memory_limit()}") from error


def is_without_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it came of, is that there was no memory. Libraries wrap it in errors of their own."""
    while error is not None:
        if isinstance(error, MemoryError) or str(error) == _NO_THREAD or str(error).endswith(_NO_LIBRARY):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        error = error.__cause__ or error.__context__
    return False


def without_memory(error: BaseException) -> str:
    """Such an error in words, where nobody said what the memory was for."""
    return f"no memory left{f' ({error})' if str(error) else ''}: {memory_limit()}"


def memory_limit() -> str:
    """What keeps this process from more memory or more threads, and what to do."""
    if sys.platform == "linux":
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_AS)
        if most != resource.RLIM_INFINITY:
            return (
                f"the address space of this process is limited to {most / 1e9:.1f} GB; lift the limit "
                "(`ulimit -v unlimited`, or that of the batch system): weights are mapped, and take more than they use"
            )
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    advice = "end other processes, use a host or a job that has more, and see `ulimit -a`"
    return f"this host has {whole / 1e9:.1f} GB in all; {advice}"


@contextmanager
def writing(path: object, then: str = "") -> Iterator[None]:
    """Inside, an error of the system names `path`, what is wrong and, where the disk is full, what to do.

    Args:
        then: what to do after that, as in "; then start the run again".
    """
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written: {write_error(error)}{then}") from error


def is_full(error: OSError) -> bool:
    """Whether there is no room for a file: the disk is full, a quota used up, or a size reached."""
    return error.errno in _FULL


def write_error(error: OSError) -> str:
    """Why a file could not be written, and what to do where there is no room for it."""
    reason = error.strerror or str(error)
    return f"{reason}; make room there" if is_full(error) else reason
