"""The signals that ask a run to stop, and what they do.

Schedulers, terminals and people send different ones: SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal is gone), SIGUSR1
and SIGUSR2 (`sbatch --signal=USR1@90`, Grid Engine), SIGXCPU (a limit of time). All of them mean the same. While a run
trains they are a request, `StopSignal`: it saves and ends. Before and after there is nothing to save: the process
leaves, with a word and an exit code. One that the process was started to ignore, as nohup does with SIGHUP, stays so;
not SIGTERM and SIGINT, which shells make a job in the background ignore, and people send it all the same.

Nothing but the standard library is imported here, so that this can be in place before everything else is imported.
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
    """A signal asked the process to leave. `word` is for the user, `code` the exit code."""

    def __init__(self, word: str, code: int):
        super().__init__(code)
        self.word = word


class StopSignal(AbstractContextManager):
    """Turns signals into a request to stop. A second Ctrl-C acts as usual: somebody is in a hurry, and is not told that
    all is saved.

    The others may come again while the run saves: a scheduler warns before it asks. Of several processes each has its
    own; one request stops all.
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
    """A handler that acts as the one before, but does not say that all is saved."""

    def hurry(number: int, frame: FrameType | None) -> None:
        try:
            before(number, frame)
        except Left:
            raise Left(_IN_A_HURRY, 128 + number) from None

    return hurry if callable(before) else before


@contextmanager
def leaving(when: str = "", code: int | None = None) -> Iterator[None]:
    """Inside, a signal raises `Left`; a second one ends the process at once.

    What is swallowed on its way, as in a callback of the garbage collector, ends the process, too.

    Args:
        when: added to the word, as in " after training".
        code: exit code; None: 128 and the number of the signal, as shells have it.
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
        if sys.unraisablehook is unraisable:  # else another was put over it meanwhile, which is to stay
            sys.unraisablehook = hook
        _restore(previous)


def leave_at_once() -> None:
    """From now on a signal ends the process where it is: for imports, which swallow exceptions and leave nothing."""
    _handle(_leave_at_once)


def _leave_at_once(number: int, frame: FrameType | None) -> NoReturn:
    _end(_word(number), 128 + number)


def _end(word: str, code: int) -> NoReturn:
    with suppress(RuntimeError, OSError, ValueError):  # the signal may have come while this was being written to
        sys.stdout.flush()
    with suppress(OSError):  # nobody may be there to read it
        os.write(2, f"{word}\n".encode())
    os._exit(code)


def _word(number: int) -> str:
    return "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"


def _handle(handler: Handler) -> dict[int, Any]:
    """Handlers as they were; nothing is changed outside the main thread, where Python allows none."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    heeded = (n for n in STOPPING if n in _NEVER_IGNORED or signal.getsignal(n) is not signal.SIG_IGN)
    return {number: signal.signal(number, handler) for number in heeded}


def _restore(previous: dict[int, Any]) -> None:
    for number, handler in previous.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not Python's
