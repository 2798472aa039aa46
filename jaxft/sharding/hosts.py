"""Several processes as one run: what they agree on, and how they end together.

Every process runs the same program on the devices of its own host. Process 0 is the writer: it alone prints, logs and
writes files. Only checkpoints are written by all processes: each writes the arrays that it holds.

Computations use collectives on the devices, which wait for ever for a missing process. The messages of this module use
JAX's coordination service, which process 0 hosts, and wait with a time limit. No process waits for one that is gone. A
process that fails says so; the others check every second, print its message and end with its exit code. A process that
was killed misses its heartbeats, and JAX ends the others. Each process says every second that it is alive, so that the
others can name the one that was killed.
"""

import functools
import itertools
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxft.sharding.cluster import CONNECT_SECONDS, find
from jaxft.sharding.jax_internals import service

PATIENCE = 6 * 3600
"""Seconds that processes wait for a process that is alive: it may be writing a large model."""
HEARTBEAT_SECONDS = int(os.environ.get("JAXFT_HEARTBEAT_SECONDS", "60"))
"""A process that is silent for this long is dead, and the run ends."""
NOTICE_SECONDS = 30
"""A process that waits this long for the others to start says so."""
FAREWELL_SECONDS = 10
"""A failure reaches all processes within this time."""
GONE_SECONDS = 3
"""After a collective failed, a process that stays silent for this long is the cause."""
SHARED_SECONDS = 60
"""On a shared file system, hosts see a file that another host wrote within this time."""

_LISTED = 5
_FAILED, _LEAVES, _ALIVE = "jaxft/failed/", "jaxft/leaves/", "jaxft/alive/"

_COLLECTIVE = re.compile(r"gloo|nccl|collective|connection (closed|reset|refused)|socket", re.IGNORECASE)
"""Words in the error of a failed collective, which JAX may also raise as a ValueError."""

T = TypeVar("T")


class HostsError(ValueError):
    """The processes of a run disagree, or one of them did not answer in time."""


def join() -> None:
    """Join the other processes of the run, if there are any (see `cluster.find`). Call it before JAX touches a device.

    Raises:
        ValueError: the others cannot be reached, or JAX has touched a device.
    """
    if service().client is None:
        here = find()
        if here is None:
            return
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from Python
        me = f"process {here.process_id} of {here.num_processes}"
        waits = f"{me} waits for the others at {here.coordinator_address}, {CONNECT_SECONDS} seconds at most"
        notice = threading.Timer(NOTICE_SECONDS, print, [waits], {"file": sys.stderr, "flush": True})
        notice.start()  # JAX ends a process that waited in vain, without saying what it waited for
        try:
            jax.distributed.initialize(
                *here,
                cluster_detection_method="deactivate",
                initialization_timeout=CONNECT_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        except RuntimeError as error:
            raise ValueError(
                f"{me} cannot join the run at {here.coordinator_address}: {str(error).splitlines()[0]}"
            ) from error
        finally:
            notice.cancel()
        jax.devices()  # backends come up in all processes together, or give up after two minutes
    _watch()


def count() -> int:
    """Number of processes in the run."""
    return service().num_processes


def index() -> int:
    """Number of this process, from 0."""
    return service().process_id


def is_writer() -> bool:
    return index() == 0


def name() -> str:
    """How messages call this process."""
    return f"process {index()} of {count()} ({socket.gethostname()})"


# Messages


def exchange(value: Any) -> list[Any]:
    """The values of all processes, as JSON, in process order. All processes must make the same calls in the same order.

    Raises:
        HostsError: a process did not answer in time.
    """
    if count() == 1:
        return [value]
    number = next(_calls)
    said, all_said = f"jaxft/said/{number}/", f"jaxft/all/{number}"
    _client().key_value_set(f"{said}{index()}", json.dumps(value))
    if is_writer():
        deadline = time.monotonic() + PATIENCE
        values = [json.loads(_get(f"{said}{other}", deadline, f"process {other}")) for other in range(count())]
        _client().key_value_set(all_said, json.dumps(values))
    return json.loads(_get(all_said, time.monotonic() + PATIENCE + FAREWELL_SECONDS, "process 0"))


def share(make: Callable[[], T]) -> T:
    """The value that the writer makes, on every process; it must be JSON."""
    return exchange(make() if is_writer() else None)[0]


def barrier() -> None:
    """Wait until all processes are here."""
    exchange(None)


def agree(facts: Mapping[str, Any]) -> None:
    """Make sure that all processes have the same facts.

    Raises:
        HostsError: they do not; the message says which processes, and what differs.
    """
    if count() == 1:
        return
    told = exchange([name(), dict(facts)])
    (first, expected), lines = told[0], []
    for other, found in told[1:]:
        for key in {**expected, **found}:
            theirs, ours = found.get(key, "nothing"), expected.get(key, "nothing")
            if theirs != ours:
                lines.append(f"\n  {key}: {theirs} on {other}, {ours} on {first}")
    if lines:
        more = f"\n  and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
        raise HostsError(
            f"the hosts of this run differ:{''.join(lines[:_LISTED])}{more}\n"
            "Every host needs the same files, config and versions"
        )


def require_shared(directory: Path) -> None:
    """Make sure that all processes see the same directory.

    Raises:
        HostsError: some do not; the message names them.
    """
    if count() == 1:
        return
    path = directory / share(lambda: f".{secrets.token_hex(8)}.tmp")
    if is_writer():
        path.touch()
    barrier()
    deadline = time.monotonic() + SHARED_SECONDS
    while not (seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = [other for other, sees in exchange([name(), seen]) if not sees]
    if is_writer():
        path.unlink()
    if blind:
        raise HostsError(
            f"{directory} is not on a file system that all hosts share: {', '.join(blind[:_LISTED])} "
            "cannot see there what process 0 writes; choose another output_dir"
        )


# The end of a run


@contextmanager
def together(*expected: type[BaseException]) -> Iterator[None]:
    """Join the run; if this process fails inside, tell the others. Errors in `expected` happen in all processes."""
    join()
    try:
        yield
    except expected:
        raise
    except BaseException as error:
        fail(f"{type(error).__name__}: {error}")  # the others end, even if this process goes on
        raise


def part() -> None:
    """The run is done: wait for the others, then disconnect."""
    if count() == 1 or service().client is None:
        return
    barrier()
    _leaving.set()
    jax.distributed.shutdown()


def fail(message: str, code: int = 1) -> None:
    """Tell the others that this process cannot go on; they end with this exit code. Returns when they know."""
    if count() == 1 or _leaving.is_set():
        return
    _leaving.set()
    _farewell(json.dumps([name(), message, code]))


def gone(error: Exception) -> str:
    """The names of the processes whose end caused this error; empty if it has another cause.

    Such a process gave no sign of life for `GONE_SECONDS` and did not say that it failed. No process waits for it any
    more.
    """
    together = isinstance(error, jax.errors.JaxRuntimeError) or _COLLECTIVE.search(str(error))
    if count() == 1 or service().client is None or not together:
        return ""
    try:
        before = _signs()
        time.sleep(GONE_SECONDS)
        after = _signs()
        spoke = {key.removeprefix(at) for at in (_FAILED, _LEAVES) for key, _ in _client().key_value_dir_get(at)}
    except jax.errors.JaxRuntimeError:
        return "process 0"  # it hosted the service, which does not answer
    silent = {int(other) for other, sign in after.items() if before.get(other) == sign and other not in spoke}
    _gone.update(silent - {index()})
    return ", ".join(json.loads(after[str(other)])[0] for other in sorted(_gone))


def _signs() -> dict[str, str]:
    """The last sign of life of each process, by its index."""
    return {key.removeprefix(_ALIVE): sign for key, sign in _client().key_value_dir_get(_ALIVE)}


def _farewell(failure: str | None) -> None:
    """Say that this process leaves, and why if it failed. Process 0 leaves last, because the service ends with it."""
    client, others = _client(), {*range(count())} - {0} - _gone
    deadline = time.monotonic() + FAREWELL_SECONDS

    def wait_for(leaving: set[int]) -> None:
        while leaving and time.monotonic() < deadline:
            leaving = leaving - {int(key.removeprefix(_LEAVES)) for key, _ in client.key_value_dir_get(_LEAVES)}
            time.sleep(0.2)

    try:
        if failure is not None:
            client.key_value_set(f"{_FAILED}{index()}", failure)
        if not is_writer():
            wait_for({0})
        client.key_value_set(f"{_LEAVES}{index()}", "")
        if is_writer():
            wait_for(others)
    except jax.errors.JaxRuntimeError as error:
        print(f"{name()}: the others cannot be told: {_first_line(error)}", file=sys.stderr)


_calls = itertools.count()
_leaving = threading.Event()
_gone: set[int] = set()


@functools.cache
def _watch() -> None:
    """From now on, check in a thread whether another process failed."""
    threading.Thread(target=_look, name="jaxft-hosts", daemon=True).start()


def _look() -> None:
    lost, heard = 0, _Heard()
    for number in itertools.count():
        if _leaving.wait(1.0):
            return
        try:
            _client().key_value_set(f"{_ALIVE}{index()}", json.dumps([name(), number]), True)
            if is_writer():
                heard.look(_signs(), time.monotonic())
            failures = _client().key_value_dir_get(_FAILED)
            lost = 0
        except jax.errors.JaxRuntimeError as error:
            lost += 1
            if lost == 3 and not _leaving.is_set():
                _end(f"{name()} ends: process 0 does not answer ({_first_line(error)})", 1)
            continue
        if failures and not _leaving.wait(1.0):  # this process may be about to fail from the same cause
            other, message, code = json.loads(failures[0][1])
            _leaving.set()
            _farewell(None)
            _end(f"{name()} ends, because {other} failed: {message}", code)


class _Heard:
    """Reports, once, each process that process 0 has not heard from for long, before JAX ends the run."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[str, float]] = {}
        self._told: set[str] = set()

    def look(self, signs: Mapping[str, str], now: float) -> None:
        for other, sign in signs.items():
            said, since = self._last.get(other, ("", now))
            if said != sign:
                self._last[other] = sign, now
            elif now - since > HEARTBEAT_SECONDS / 2 and other not in self._told:
                self._told.add(other)
                print(
                    f"{json.loads(sign)[0]} has not been heard of for {now - since:.0f} seconds: it was killed, or its "
                    f"host or the network is down; after {HEARTBEAT_SECONDS} the run ends",
                    file=sys.stderr,
                    flush=True,
                )


def _end(message: str, code: int) -> None:
    print(message, file=sys.stderr, flush=True)
    os._exit(code)  # the main thread may be waiting, on a device, for a process that will not come


def _get(key: str, deadline: float, who: str) -> str:
    milliseconds = max(1, round(1000 * (deadline - time.monotonic())))
    try:
        return _client().blocking_key_value_get(key, milliseconds)
    except jax.errors.JaxRuntimeError as error:
        raise HostsError(f"{name()} waited for {who} in vain: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _client() -> Any:
    return service().client
