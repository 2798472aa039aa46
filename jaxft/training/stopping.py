"""Handles the signals that ask a run to stop.

Schedulers, terminals and people send different signals: SIGTERM, SIGINT (Ctrl-C), SIGHUP (terminal gone), SIGUSR1
and SIGUSR2 (`sbatch --signal=USR1@90`, Grid Engine), SIGXCPU (a time limit). All of them mean the same. While a run
trains, a signal is a request (`StopSignal`): the run saves and ends. Before and after training there is nothing to
save: the process exits with a message and an exit code. A signal that the process was started to ignore stays ignored,
as nohup does with SIGHUP. SIGTERM and SIGINT are never ignored: shells make background jobs ignore them, and people
send them all the same.

This module imports only the standard library, so that the handlers can be in place before all other imports.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, Self

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)

_NEVER_IGNORED = (signal.SIGTERM, signal.SIGINT)
_IN_A_HURRY = (
    "interrupted without waiting for a checkpoint; resume_from_checkpoint=true goes on from the newest that there is"
)

Handler = Callable[[int, FrameType | None], Any]


class Left(SystemExit):
    """A signal asked the process to leave. `word` is the message for the user, `code` the exit code."""

    def __init__(self, word: str, code: int):
        super().__init__(code)
        self.word = word


class StopSignal(AbstractContextManager):
    """Turns signals into a request to stop. A second Ctrl-C acts as it did before, because the user is in a
    hurry; its message does not say that everything is saved.

    The other signals may come again while the run saves: a scheduler warns before it stops a job. Each process has its
    own `StopSignal`; a request in one process stops all.
    """

    def __init__(self):
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._previous = _handle(self._request)
        return self

    def __exit__(self, *error: object) -> None:
        _restore(self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            _restore({number: _hurried(self._previous[number])})


def _hurried(before: Any) -> Any:
    """A handler that acts as `before` does, but does not say that everything is saved."""

    def hurry(number: int, frame: FrameType | None) -> None:
        try:
            before(number, frame)
        except Left:
            raise Left(_IN_A_HURRY, 128 + number) from None

    return hurry if callable(before) else before


@contextmanager
def leaving(when: str = "", code: int | None = None) -> Iterator[None]:
    """Inside the block, a signal raises `Left`; a second signal ends the process at once.

    If Python swallows `Left`, as in a callback of the garbage collector, the process ends too.

    Args:
        when: text added to the message, for example " after training".
        code: exit code; None means 128 plus the number of the signal, as in shells.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        _handle(_leave_at_once)
        raise Left(_word(number) + when, 128 + number if code is None else code)

    def unraisable(found: Any) -> None:
        if isinstance(found.exc_value, Left):
            _end(found.exc_value.word, found.exc_value.code)
        hook(found)

    hook, previous = sys.unraisablehook, _handle(leave)
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        if sys.unraisablehook is unraisable:  # otherwise a newer hook replaced it and stays
            sys.unraisablehook = hook
        _restore(previous)


def leave_at_once() -> None:
    """From now on a signal ends the process at once. For imports: they swallow exceptions and have nothing to save."""
    _handle(_leave_at_once)


def _leave_at_once(number: int, frame: FrameType | None) -> NoReturn:
    _end(_word(number), 128 + number)


def _end(word: str, code: int) -> NoReturn:
    with suppress(RuntimeError, OSError, ValueError):  # the signal may have interrupted a write to stdout
        sys.stdout.flush()
    with suppress(OSError):  # stderr may be closed
        os.write(2, f"{word}\n".encode())
    os._exit(code)


def _word(number: int) -> str:
    return "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"


def _handle(handler: Handler) -> dict[int, Any]:
    """Set the handlers and return the previous ones. Does nothing outside the main thread: Python forbids it there."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    heeded = (n for n in STOPPING if n in _NEVER_IGNORED or signal.getsignal(n) is not signal.SIG_IGN)
    return {number: signal.signal(number, handler) for number in heeded}


def _restore(previous: dict[int, Any]) -> None:
    for number, handler in previous.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set outside Python
