"""Clear errors if the system refuses memory or disk space, instead of "damaged file" or an error number.

Python reports a lack of memory in four ways: a `MemoryError`, mostly without text; the errno ENOMEM for a file that
cannot be mapped; an error for a library that cannot be mapped; an error for a thread that cannot be started.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_NO_THREAD = "can't start new thread"  # Python's text, in a RuntimeError: each thread needs a stack
_NO_LIBRARY = "failed to map segment from shared object"  # the loader's text, in an ImportError or OSError
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class NoMemoryError(MemoryError):
    """No memory for something; the text names it, and the limit that was reached."""


@contextmanager
def memory_for(what: object) -> Iterator[None]:
    """Inside, a lack of memory becomes a `NoMemoryError` that names `what`, a file or directory."""
    try:
        yield
    except NoMemoryError:
        raise
    except Exception as error:
        if not is_without_memory(error):
            raise
        raise NoMemoryError(f"{what}: no memory for it: {memory_limit()}") from error


def is_without_memory(error: BaseException | None) -> bool:
    """Whether an error, or a cause of it, is a lack of memory. Libraries wrap it in their own errors."""
    while error is not None:
        if isinstance(error, MemoryError) or str(error) == _NO_THREAD or str(error).endswith(_NO_LIBRARY):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        error = error.__cause__ or error.__context__
    return False


def without_memory(error: BaseException) -> str:
    """The text for a lack of memory, if it is not known what the memory was for."""
    return f"no memory left{f' ({error})' if str(error) else ''}: {memory_limit()}"


def memory_limit() -> str:
    """What limits the memory or the threads of this process, and what to do."""
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
    """Inside, an OSError names `path`, the fault and, if the disk is full, what to do.

    Args:
        then: what to do after that, as in "; then start the run again".
    """
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written: {write_error(error)}{then}") from error


def is_full(error: OSError) -> bool:
    """Whether there is no room for a file: the disk is full, a quota is used up, or a size limit is reached."""
    return error.errno in _FULL


def write_error(error: OSError) -> str:
    """Why a file could not be written, and what to do if there is no room for it."""
    reason = error.strerror or str(error)
    return f"{reason}; make room there" if is_full(error) else reason
