"""Which signals stop a run, and what a process does with them that is not training."""

import signal
import subprocess
import sys
import threading

import pytest

from jaxft.training.stopping import STOPPING, Left, StopSignal, leaving

NAMES = [number.name for number in STOPPING]


@pytest.fixture
def heard():
    """Signals that reach the handlers of whoever called; these are put back."""
    found: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: found.append(number)) for number in STOPPING}
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


def test_all_that_schedulers_terminals_and_people_send():
    assert NAMES == ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"]


@pytest.mark.parametrize("name", NAMES)
def test_a_request_to_stop_may_be_repeated_but_a_second_interrupt_acts_as_usual(heard, name):
    number = signal.Signals[name]
    with StopSignal() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        assert heard == []
        signal.raise_signal(number)
        assert heard == ([number] if number == signal.SIGINT else [])
    with StopSignal() as stop:
        pass
    signal.raise_signal(number)
    assert heard[-1] == number
    assert not stop.requested


@pytest.mark.parametrize("name", NAMES)
def test_what_was_ignored_stays_ignored_but_for_those_that_people_send(heard, name):
    number = signal.Signals[name]
    signal.signal(number, signal.SIG_IGN)
    with StopSignal() as stop:
        signal.raise_signal(number)
    assert stop.requested == (name in ("SIGTERM", "SIGINT"))
    assert signal.getsignal(number) == signal.SIG_IGN


@pytest.mark.parametrize("name", NAMES)
def test_elsewhere_a_signal_ends_the_process_with_a_word(heard, name):
    """By an exception, so that what is half written is removed."""
    number = signal.Signals[name]
    word = "interrupted" if name == "SIGINT" else f"stopped by {name}"
    with pytest.raises(Left) as left, leaving():
        signal.raise_signal(number)
    assert (left.value.word, left.value.code) == (word, 128 + number)

    def train() -> None:
        with leaving(), leaving(" after training", 75):
            with StopSignal() as stop:
                signal.raise_signal(number)
            assert stop.requested
            signal.raise_signal(number)

    with pytest.raises(Left) as left:
        train()
    assert (left.value.word, left.value.code) == (f"{word} after training", 75)
    signal.raise_signal(number)
    assert heard == [number]


def test_a_second_interrupt_does_not_say_that_all_is_saved(heard):
    """Unlike one signal before or after training. What had been saved by then is what a resumed run goes on from."""

    def train(interrupted_after: bool) -> None:
        with leaving(" after training; resume", 75):
            with StopSignal() as stop:
                signal.raise_signal(signal.SIGINT)
                assert stop.requested
                if not interrupted_after:
                    signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Left) as left:
        train(interrupted_after=False)
    assert (left.value.word, left.value.code) == (
        "interrupted without waiting for a checkpoint; "
        "resume_from_checkpoint=true goes on from the newest that there is",
        130,
    )
    with pytest.raises(Left) as left:
        train(interrupted_after=True)
    assert (left.value.word, left.value.code) == ("interrupted after training; resume", 75)
    assert heard == []


def test_outside_the_main_thread_signals_are_left_alone():
    handlers, seen = [signal.getsignal(number) for number in STOPPING], []

    def enter() -> None:
        with StopSignal() as stop, leaving():
            seen.append(([signal.getsignal(number) for number in STOPPING], stop.requested))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(handlers, False)]


def test_what_others_do_with_swallowed_exceptions_stays(monkeypatch):
    """They keep quiet about threads that outlive the run."""
    before, theirs = [lambda found: None for _ in range(2)]
    monkeypatch.setattr(sys, "unraisablehook", before)
    with leaving(), leaving():
        assert sys.unraisablehook is not before
    assert sys.unraisablehook is before
    with leaving():
        sys.unraisablehook = theirs
        with leaving():
            pass
        assert sys.unraisablehook is theirs
    assert sys.unraisablehook is theirs


SWALLOWED = """
import gc, os, signal, sys
from jaxft.training.stopping import leaving
print("before")
with leaving():
    gc.callbacks.append(lambda phase, info: signal.raise_signal(signal.SIGINT))
    gc.collect()
print("after")
"""
TWICE = """
import os, signal, time
from jaxft.training.stopping import leaving
with leaving():
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.raise_signal(signal.SIGUSR1)
        print("after")
"""


@pytest.mark.parametrize(
    "script, said, code", [(SWALLOWED, "interrupted\n", 130), (TWICE, "stopped by SIGUSR1\n", 128 + signal.SIGUSR1)]
)
def test_what_is_swallowed_or_comes_twice_ends_the_process(script, said, code):
    """JAX has a callback of the garbage collector, and what is raised in such a callback goes nowhere."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stderr, done.returncode) == (said, code)
    assert "after" not in done.stdout
