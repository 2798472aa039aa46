"""What processes say to each other and hold together, and that none of them waits for one that is gone."""

import json
import socket
import time

import pytest
from jax.errors import JaxRuntimeError

from jaxft.sharding import hosts
from jaxft.sharding.jax_internals import Service

SPEAK = """
import sys
from pathlib import Path

import jax
import numpy as np

from jaxft.cli.command import exit_code
from jaxft.hub import stream
from jaxft.hub.load import load_model
from jaxft.sharding import arrays, hosts
from jaxft.sharding.mesh import make_mesh

root, model = Path(sys.argv[1]), sys.argv[2]


def refused(action):
    try:
        action()
    except hosts.HostsError as error:
        return str(error)
    raise AssertionError("not refused")


def speak():
    me = hosts.index()
    assert hosts.count() == 2 and hosts.is_writer() == (me == 0)
    assert hosts.exchange([me, "é"]) == [[0, "é"], [1, "é"]]
    made = []
    assert hosts.share(lambda: made.append(me) or {"by": me}) == {"by": 0}
    assert made == ([0] if me == 0 else [])
    hosts.agree({"same": 1})
    told = refused(lambda: hosts.agree({"same": 1, "data": me, **({"more": 2} if me else {})}))
    first, second = hosts.exchange(hosts.name())
    assert f"data: 1 on {second}, 0 on {first}" in told and f"more: 2 on {second}, nothing on {first}" in told

    (root / "shared").mkdir(exist_ok=True)
    hosts.require_shared(root / "shared")
    hosts.SHARED_SECONDS = 1
    (root / str(me)).mkdir()
    told = refused(lambda: hosts.require_shared(root / str(me)))
    assert f"not on a file system that all hosts share: {second} cannot see" in told
    hosts.barrier()
    assert not any(path.name.startswith(".") for path in root.rglob("*"))


def hold():
    me = hosts.index()
    cut = make_mesh({"data": 2, "fsdp": 2})
    assert arrays.any_process([me == 1, False, True], cut) == [True, False, True]
    values = np.arange(64, dtype=np.float32).reshape(8, 8)
    array = arrays.place(values, jax.NamedSharding(cut, jax.P("data", "fsdp")))
    assert not array.is_fully_addressable
    np.testing.assert_array_equal(arrays.on_host(array), values)
    turned = arrays.place(array, jax.NamedSharding(cut, jax.P(None, ("fsdp", "data"))))
    np.testing.assert_array_equal(arrays.on_host(turned * 2), values * 2)
    assert arrays.rows_here(cut, 8) == tuple(range(4 * me, 4 * me + 4))
    everything = np.arange(3 * 8 * 6, dtype=np.int32).reshape(3, 8, 6)
    for sizes in ({"data": 2, "fsdp": 2}, {"data": 2, "context": 2}, {"context": 2, "tensor": 2}, {"tensor": 4}):
        mesh = make_mesh(sizes)
        rows = arrays.rows_here(mesh, 8)
        batch = arrays.place_rows({"x": everything[:, list(rows)]}, mesh, 8, leading=1)["x"]
        assert batch.shape == everything.shape
        np.testing.assert_array_equal(arrays.on_host(batch), everything)


def load():
    whole = load_model(model)
    sizes, read = [], stream._read

    def counted(*arguments):
        part = read(*arguments)
        sizes.append(part.nbytes)
        return part

    stream._read = counted
    half = load_model(model, mesh=make_mesh({"fsdp": -1}))
    by_process = hosts.exchange(sum(sizes))
    tokens = np.arange(12, dtype=np.int32).reshape(4, 3)
    logits = jax.jit(lambda m, t: m(t), out_shardings=jax.NamedSharding(half.activations.mesh, jax.P()))
    rows = arrays.place(tokens, jax.NamedSharding(half.activations.mesh, jax.P("fsdp")))
    np.testing.assert_allclose(arrays.on_host(logits(half, rows)), whole(tokens), rtol=1e-4, atol=1e-4)
    if hosts.is_writer():
        print("read", *by_process, flush=True)


def fail():
    mesh = make_mesh({"data": -1})
    arrays.any_process([False], mesh)
    if hosts.index() == 1:
        raise ValueError("no luck")
    arrays.any_process([False], mesh)  # waits for one that does not come


def act():
    speak()
    hold()
    load()
    fail()


sys.exit(exit_code(act))
"""

WAIT = """
import sys
import time

from jaxft.cli.command import exit_code
from jaxft.sharding import arrays, hosts
from jaxft.sharding.mesh import make_mesh


def act():
    mesh = make_mesh({"data": -1})
    arrays.any_process([False], mesh)
    print("here", flush=True)
    time.sleep(2)  # in which each says that it is alive
    if hosts.index() == int(sys.argv[1]):
        time.sleep(1000)  # this one is killed
    arrays.any_process([False], mesh)


sys.exit(exit_code(act))
"""


@pytest.mark.slow
def test_processes_agree_share_arrays_and_end_together(start_job, chat_model, tmp_path):
    model = chat_model()
    job = start_job(2, 2, "-c", SPEAK, tmp_path, model)
    start = time.monotonic()
    assert job.end() == [2, 2], job.told()
    assert "error: no luck" in job.said(1)
    assert job.said(1).startswith("process 1 of 2 (")
    assert ") failed: error: no luck" in job.said(0)
    (line,) = (line for line in job.said(0).splitlines() if line.startswith("read "))
    sizes = [int(word) for word in line.split()[1:]]
    stored = (model / "model.safetensors").stat().st_size
    assert all(0.45 * stored < size < 0.55 * stored for size in sizes), (sizes, stored)
    assert time.monotonic() - start < 100


@pytest.mark.slow
@pytest.mark.parametrize("processes, killed", [(2, 0), (2, 1), (3, 2)])
def test_the_others_end_when_one_is_killed_and_name_it(start_job, processes, killed):
    job = start_job(processes, 1, "-c", WAIT, killed)
    job.wait_for(lambda: "here" in job.said(killed))
    time.sleep(3)
    job.processes[killed].kill()
    start = time.monotonic()
    codes = job.end()
    assert codes[killed] == -9
    assert not {0, 75} & set(codes)
    assert time.monotonic() - start < 30
    if killed == 0:  # with which the service went
        assert "process 0" in job.said(1) or "coordination service" in job.said(1)
        return
    named = f"process {killed} of {processes} ({socket.gethostname()}) "
    first = job.said(0).splitlines()[1]  # after "here", and before all that JAX may say
    assert f"{named}is gone: it was killed" in first or first.startswith(f"{named}has not been heard of for "), (
        job.told()
    )
    assert "Traceback" not in job.told()


@pytest.mark.core
def test_who_falls_silent_is_named_once(capsys, monkeypatch):
    monkeypatch.setattr(hosts, "HEARTBEAT_SECONDS", 60)
    heard = hosts._Heard()

    def look(now, **beats):
        signs = {str(ord(name) - ord("a")): json.dumps([f"process {name}", beat]) for name, beat in beats.items()}
        heard.look(signs, now)
        return capsys.readouterr().err

    assert look(0.0, a=0, b=0) == ""
    assert look(20.0, a=20, b=0, c=1) == ""
    assert look(30.0, a=30, b=0, c=1) == "", "half of the time that it has"
    said = look(31.0, a=31, b=0, c=1)
    assert said.startswith("process b has not been heard of for 31 seconds: it was killed, or its host")
    assert said.endswith("; after 60 the run ends\n")
    assert look(32.0, a=32, b=0, c=1) == ""
    assert "process c has not been heard of for 31 seconds" in look(51.0, a=51, b=1, c=1)


@pytest.mark.core
def test_an_error_of_its_own_is_blamed_on_nobody(monkeypatch):
    """And nobody is looked for: that takes seconds."""
    monkeypatch.setattr(hosts, "service", lambda: Service("not asked", 0, 2))
    assert hosts.gone(ValueError("config.json: no such file")) == ""
    monkeypatch.setattr(hosts, "service", lambda: Service(None, 0, 1))
    assert hosts.gone(ValueError("Gloo all-reduce failed")) == ""


class Client:
    """Of the coordination service: what processes say, in the order in which it is looked at."""

    def __init__(self, *signs, spoke=()):
        self.signs, self.spoke = iter(signs), spoke

    def key_value_dir_get(self, at):
        if at == hosts._ALIVE:
            return [
                (f"{at}{other}", json.dumps([f"process {other}", beat])) for other, beat in next(self.signs).items()
            ]
        return [(f"{at}{other}", "") for other in self.spoke if at == hosts._FAILED]


@pytest.mark.core
@pytest.mark.parametrize(
    "error",
    [
        ValueError("UNKNOWN: Gloo all-reduce failed"),
        JaxRuntimeError("INTERNAL: x"),
        OSError("Connection reset by peer"),
    ],
)
@pytest.mark.parametrize(
    "before, after, spoke, expected",
    [
        ({0: 5, 1: 7, 2: 3}, {0: 5, 1: 8, 2: 3}, (), "process 2"),
        ({0: 5, 1: 7, 2: 3, 11: 1}, {0: 6, 1: 8, 2: 3, 11: 1}, (), "process 2, process 11"),
        ({0: 5, 1: 7, 2: 3}, {0: 6, 1: 7, 2: 3}, (1,), "process 2"),
        ({0: 5, 1: 7}, {0: 6, 1: 8, 2: 0}, (), ""),
    ],
)
def test_the_silent_are_gone_but_not_who_said_that_it_fails(monkeypatch, error, before, after, spoke, expected):
    service = Service(Client(before, after, spoke=spoke), 0, 12)
    monkeypatch.setattr(hosts, "service", lambda: service)
    monkeypatch.setattr(hosts, "GONE_SECONDS", 0)
    monkeypatch.setattr(hosts, "_gone", set())
    assert hosts.gone(error) == expected
