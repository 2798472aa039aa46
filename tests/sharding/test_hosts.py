"""What processes say to each other and hold together, and that none of them waits for one that is gone."""

import time

import pytest

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
    if hosts.index() == 0:
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
def test_the_others_end_when_the_first_is_killed(start_job):
    job = start_job(2, 1, "-c", WAIT)
    job.wait_for(lambda: "here" in job.said(0))
    job.processes[0].kill()
    start = time.monotonic()
    codes = job.end()
    assert codes[0] == -9
    assert codes[1] not in (0, 75)
    assert time.monotonic() - start < 30
    assert "process 0" in job.said(1) or "coordination service" in job.said(1)
