"""What a checkpoint promises, under every fault a disk or a kill can cause."""

import logging
import resource
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.sharding.mesh import make_mesh
from jaxft.training import orbax_arrays
from jaxft.training.checkpoint import CheckpointError, Checkpoints, DamagedCheckpointError
from jaxft.training.manifest import state_digest
from jaxft.training.state import TrainState
from jaxft.training.step import initial_state

Q, V, NORM = "model.layers.self_attn.q_proj.A", "model.layers.self_attn.v_proj.B", "model.norm.weight"
LARGE = 100_000  # rows; 3.2 MB in each of three arrays
CUT = P("fsdp", "tensor")
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.0, 1e-2, 5)))


def make_state(seed: int = 0, *, rows: int = 256, dtype=jnp.float32, mesh=None, spec=CUT) -> TrainState:
    """A state as after some updates: every leaf differs from every other, a bfloat16 one among them."""
    random = np.random.default_rng(seed)

    def values(shape, dtype):
        array = jnp.asarray(random.normal(size=shape), dtype)
        if mesh is None:
            return array
        return jax.device_put(array, NamedSharding(mesh, spec if len(shape) == 2 else P()))

    def fill(leaf):
        return values(leaf.shape, leaf.dtype) if leaf.ndim else leaf + 7

    trained = {Q: values((rows, 8), dtype), V: values((8, 4), jnp.float32), NORM: values((8,), jnp.bfloat16)}
    state = initial_state(trained, OPTIMIZER)
    optimizer = jax.tree.map(fill, state.optimizer)
    return state._replace(step=jnp.int32(seed), optimizer=optimizer, skipped=jnp.int32(2))


def assert_same(actual: TrainState, expected: TrainState) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def save_steps(directory: Path, *steps: int, keep: int = 5) -> None:
    with Checkpoints(directory, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"at": step})


def where(step: Path) -> tuple[Path, int]:
    """The file that holds an array of this step, and where in it."""
    array = np.asarray(make_state(int(step.name)).trained[Q]).tobytes()
    ((path, start),) = [
        (path, path.read_bytes().find(array))
        for path in step.rglob("*")
        if path.is_file() and array in path.read_bytes()
    ]
    return path, start


# Round trip


def test_a_new_process_gets_the_same_bits_and_progress(tmp_path):
    progress = {"data": {"next_index": 41}, "best": float("inf"), "bad": [1, 0.1, None], "name": "é"}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(3, make_state(3), progress)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        step, state, restored = checkpoints.restore(make_state(99))
    assert (step, restored) == (3, progress)
    assert_same(state, make_state(3))
    assert state_digest(state) == state_digest(make_state(3)) != state_digest(make_state(4))


def test_progress_may_hold_nan(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1), {"loss": float("nan")})
        assert np.isnan(checkpoints.restore(make_state()).progress["loss"])


def test_the_trained_arrays_come_back_alone(tmp_path, monkeypatch):
    state, read = make_state(3, mesh=make_mesh({"fsdp": 4, "tensor": 2})), []
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, state, {})
        whole = orbax_arrays.read
        monkeypatch.setattr(orbax_arrays, "read", lambda path, wanted: read.append([*wanted]) or whole(path, wanted))
        trained = checkpoints.restore_trained(state.trained, 3)
        assert read == [[f"trained.{name}" for name in state.trained]]
        assert trained.keys() == state.trained.keys()
        for name, array in trained.items():
            assert array.sharding == state.trained[name].sharding
            np.testing.assert_array_equal(np.asarray(array), np.asarray(state.trained[name]))
        with pytest.raises(CheckpointError, match="no checkpoint of step 2"):
            checkpoints.restore_trained(state.trained, 2)
        with pytest.raises(CheckpointError, match=rf"trained\.{Q}: .* in the checkpoint, missing in the run"):
            checkpoints.restore_trained({name: state.trained[name] for name in (V, NORM)}, 3)
        lose_the_arrays(tmp_path / "3")
        with pytest.raises(DamagedCheckpointError):
            checkpoints.restore_trained(state.trained, 3)


def test_state_may_be_donated_while_it_is_written(tmp_path):
    @partial(jax.jit, donate_argnums=0)
    def overwrite(state):
        return jax.tree.map(lambda leaf: leaf * jnp.asarray(-3, leaf.dtype), state)

    state = make_state(1, rows=LARGE)
    expected = state_digest(state)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(5):
            state = overwrite(state)
        assert state_digest(checkpoints.restore(state).state) == expected


def test_restored_arrays_lie_as_the_template_does(tmp_path):
    before = make_mesh({"fsdp": 4, "tensor": 2})
    after = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1, mesh=before), {})
        template = make_state(2, mesh=after, spec=P("tensor", None))
        state = checkpoints.restore(template).state
    assert_same(state, make_state(1))
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(template), strict=True):
        assert got.sharding == want.sharding
        assert got.committed == want.committed
    assert state.trained[Q].addressable_shards[0].data.shape == (128, 8)
    assert not state.step.committed, "a committed scalar would not go with arrays on eight devices"
    jax.block_until_ready(jax.jit(lambda s: s.trained[Q] * s.step.astype(jnp.float32))(state))


def test_five_million_parameters_take_little_time(tmp_path):
    trained = {f"layer.{i}.A": jnp.full((1000, 500), i + 0.5, jnp.float32) for i in range(10)}
    state = initial_state(trained, optax.adamw(1e-3))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        seconds = []
        for step in (2, 3, 4):
            start = time.perf_counter()
            checkpoints.save(step, state, {})
            checkpoints.wait()
            seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2.0


# Which steps are kept


def test_the_newest_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert (checkpoints.steps(), checkpoints.best_step()) == ([], None)
        for step in (1, 2, 3, 4, 5):
            checkpoints.save(step, make_state(step), {"at": step}, keep_as_best=step in (1, 2))
        assert (checkpoints.steps(), checkpoints.best_step()) == ([2, 4, 5], 2)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert (checkpoints.steps(), checkpoints.best_step()) == ([2, 4, 5], 2)
        best = checkpoints.restore(make_state(), checkpoints.best_step())
        assert (best.step, best.progress) == (2, {"at": 2})
        assert_same(best.state, make_state(2))
        checkpoints.save(6, make_state(6), {}, keep_as_best=True)
        checkpoints.save(7, make_state(7), {})
        checkpoints.save(8, make_state(8), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["6", "7", "8"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    save_steps(tmp_path, 1)
    for left in ("2.orbax-checkpoint-tmp/state", "3.orbax-checkpoint-tmp-1700000000/d", "outdated/0/state"):
        (tmp_path / left).mkdir(parents=True)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == [1]
        assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_steps_go_up(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(5, make_state(5), {})
        for step in (5, 4):
            with pytest.raises(CheckpointError, match=f"cannot save step {step} after step 5"):
                checkpoints.save(step, make_state(6), {})
        assert_same(checkpoints.restore(make_state()).state, make_state(5))


def test_unknown_step_and_no_step(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.raises(CheckpointError, match="no intact checkpoint to go on from: there are none"):
            checkpoints.restore(make_state())
        checkpoints.save(5, make_state(5), {})
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 4; there are \[5\]"):
            checkpoints.restore(make_state(), step=4)


@pytest.mark.parametrize("keep", [0, -1])
def test_at_least_one_is_kept(tmp_path, keep):
    with pytest.raises(ValueError, match=f"at least one checkpoint, not {keep}"):
        Checkpoints(tmp_path, keep)


# Damage


def flip_a_byte_of_the_arrays(step: Path) -> None:
    path, start = where(step)
    data = bytearray(path.read_bytes())
    data[start + 101] ^= 0x10
    path.write_bytes(data)


def truncate_the_arrays(step: Path) -> None:
    path, start = where(step)
    path.write_bytes(path.read_bytes()[: start + 100])


def lose_the_arrays(step: Path) -> None:
    shutil.rmtree(step / "state")


def change_the_progress(step: Path) -> None:
    path = step / "manifest" / "metadata"
    path.write_text(path.read_text().replace('"at": 3', '"at": 2'))


def truncate_the_manifest(step: Path) -> None:
    path = step / "manifest" / "metadata"
    path.write_text(path.read_text()[:-20])


def lose_the_manifest(step: Path) -> None:
    shutil.rmtree(step / "manifest")


def empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def replace_by_another_step(step: Path) -> None:
    shutil.rmtree(step)
    shutil.copytree(step.with_name("2"), step)


def replace_the_arrays_by_another_steps(step: Path) -> None:
    shutil.rmtree(step / "state")
    shutil.copytree(step.with_name("2") / "state", step / "state")


@pytest.mark.parametrize(
    "damage, reason",
    [
        (flip_a_byte_of_the_arrays, f"trained.{Q} does not match its digest$"),
        (truncate_the_arrays, "damaged"),
        (lose_the_arrays, "state"),
        (change_the_progress, "manifest does not match its SHA-256"),
        (truncate_the_manifest, "damaged"),
        (lose_the_manifest, "manifest"),
        (empty, "manifest"),
        (replace_by_another_step, "it holds step 2"),
        (replace_the_arrays_by_another_steps, "does not match its digest, nor do"),
    ],
)
def test_a_damaged_step_is_passed_over_and_named(tmp_path, caplog, damage, reason):
    save_steps(tmp_path, 1, 2, 3)
    damage(tmp_path / "3")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.raises(DamagedCheckpointError, match=reason):
            checkpoints.restore(make_state(), step=3)
        with caplog.at_level(logging.WARNING, "jaxft"):
            step, state, progress = checkpoints.restore(make_state())
        assert (step, progress) == (2, {"at": 2})
        assert_same(state, make_state(2))
        (record,) = [record for record in caplog.records if record.name.startswith("jaxft")]
        assert f"{tmp_path / '3'} is damaged: " in record.getMessage()
        assert record.getMessage().endswith("going on from step 2 instead")
        assert checkpoints.steps() == [1, 2]

        checkpoints.save(3, make_state(33), {})  # the run comes to the damaged step again
        assert checkpoints.steps() == [2, 3]
        assert_same(checkpoints.restore(make_state()).state, make_state(33))


def test_damaged_newer_steps_do_not_push_out_good_ones(tmp_path):
    save_steps(tmp_path, 1, 8, 9)
    for name in ("8", "9"):
        flip_a_byte_of_the_arrays(tmp_path / name)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(make_state()).step == 1
        checkpoints.save(2, make_state(2), {})
        assert checkpoints.steps() == [1, 2]


def test_whichever_file_rots_the_bits_are_the_saved_ones_or_the_damage_is_noticed(tmp_path):
    save_steps(tmp_path, 1)
    random = np.random.default_rng(0)
    files = sorted(path for path in (tmp_path / "1").rglob("*") if path.is_file())
    noticed = 0
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for path in files * 2:
            original = path.read_bytes()
            data = bytearray(original)
            data[random.integers(len(data))] ^= 1 << random.integers(8)
            path.write_bytes(data)
            try:
                assert_same(checkpoints.restore(make_state(), step=1).state, make_state(1))
            except DamagedCheckpointError:
                noticed += 1
            path.write_bytes(original)
        assert_same(checkpoints.restore(make_state(), step=1).state, make_state(1))
    assert noticed >= 4


def test_no_intact_step_is_an_error_that_lists_them(tmp_path):
    save_steps(tmp_path, 1, 2)
    flip_a_byte_of_the_arrays(tmp_path / "1")
    empty(tmp_path / "2")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.raises(CheckpointError, match="no intact checkpoint to go on from") as raised:
            checkpoints.restore(make_state())
        assert checkpoints.steps() == [1, 2], "nothing is deleted"
    assert all(f"{tmp_path / name} is damaged" in str(raised.value) for name in ("1", "2"))


def test_a_damaged_best_step_is_said(tmp_path, caplog):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, make_state(1), {}, keep_as_best=True)
        checkpoints.save(2, make_state(2), {})
        checkpoints.wait()
        lose_the_manifest(tmp_path / "1")
        assert checkpoints.best_step() is None
    assert "it cannot be the best checkpoint" in caplog.text


# Another model


@pytest.mark.parametrize(
    "other, difference",
    [
        (
            {"dtype": jnp.bfloat16},
            rf"trained\.{Q}: float32 \[256, 8\] in the checkpoint, bfloat16 \[256, 8\] in the run",
        ),
        ({"rows": 8}, rf"trained\.{Q}: float32 \[256, 8\] in the checkpoint, float32 \[8, 8\] in the run"),
    ],
)
def test_dtype_and_shape_are_not_converted(tmp_path, other, difference):
    save_steps(tmp_path, 1, 2)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.raises(CheckpointError, match=difference) as raised:
            checkpoints.restore(make_state(**other))
        assert not isinstance(raised.value, DamagedCheckpointError)
        assert checkpoints.steps() == [1, 2]


def test_names_and_optimizer_must_agree(tmp_path):
    save_steps(tmp_path, 1)
    trained = {"other" if name == V else name: array for name, array in make_state(1).trained.items()}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.raises(CheckpointError, match="not of this model and optimizer") as raised:
            checkpoints.restore(initial_state(trained, OPTIMIZER))
        assert "trained.other: missing in the checkpoint" in str(raised.value)
        with pytest.raises(CheckpointError, match=r"optimizer\.0\.trace\S+: missing in the checkpoint") as raised:
            checkpoints.restore(initial_state(make_state(1).trained, optax.sgd(0.1, momentum=0.9)))
        assert "more" in str(raised.value)


# Values and space


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("name", [Q, NORM])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, bad, name):
    state = make_state(2)
    state.trained[name] = state.trained[name].at[(1,) * state.trained[name].ndim].set(bad)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        with pytest.raises(CheckpointError, match=rf"step 2 is not saved: trained\.{name} holds values .* not finite"):
            checkpoints.save(2, state, {})
        assert_same(checkpoints.restore(make_state()).state, make_state(1))


def test_an_optimizer_that_is_not_finite_is_not_saved(tmp_path):
    state = make_state(1)
    state.optimizer[1][0].nu[V] = state.optimizer[1][0].nu[V].at[0, 0].set(jnp.inf)
    with (
        Checkpoints(tmp_path, keep=1) as checkpoints,
        pytest.raises(CheckpointError, match=rf"optimizer\.1\.0\.nu\.{V} holds"),
    ):
        checkpoints.save(1, state, {})
    assert not list(tmp_path.iterdir())


def test_space_is_checked_first(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=500_000))
        with pytest.raises(
            CheckpointError, match=r"0\.5 MB of free space, .* 1\.\d MB: make room there; there is none"
        ):
            checkpoints.save(1, make_state(1), {})
        monkeypatch.undo()
        checkpoints.save(1, make_state(1), {})
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=500_000))
        with pytest.raises(CheckpointError, match="the checkpoint of step 1 is there to resume from"):
            checkpoints.save(2, make_state(2), {})
        assert checkpoints.steps() == [1]


@contextmanager
def full_disk():
    """No file may grow beyond what a large state needs; those of the test runner itself are small."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_up_leaves_the_last_good_step(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1, rows=LARGE), {"at": 1}, keep_as_best=True)
        checkpoints.wait()
        with full_disk():
            checkpoints.save(2, make_state(2, rows=LARGE), {"at": 2}, keep_as_best=True)
            with pytest.raises(CheckpointError, match=r"2 could not be written: .*step 1 is there to resume from"):
                checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best_step()) == ([1], 1)
        assert_same(checkpoints.restore(make_state(rows=LARGE)).state, make_state(1, rows=LARGE))
        checkpoints.save(2, make_state(2, rows=LARGE), {"at": 2})  # there is space again
        assert checkpoints.restore(make_state(rows=LARGE)).progress == {"at": 2}


def test_a_failed_save_is_told_soon_after_it_failed(tmp_path):
    """Not at the next one, which may come an hour later."""
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert not checkpoints.saving()
        checkpoints.save(1, make_state(1), {})
        checkpoints.wait()
        assert not checkpoints.saving()
        with full_disk():
            checkpoints.save(2, make_state(2, rows=LARGE), {})
            assert checkpoints.saving()
            deadline = time.monotonic() + 30
            while checkpoints.saving():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            with pytest.raises(CheckpointError, match=r"2 could not be written: .*step 1 is there to resume from"):
                checkpoints.wait()
        checkpoints.save(2, make_state(2), {})
        assert checkpoints.steps() == [2]


@pytest.mark.parametrize("moved", [True, False])
def test_a_directory_that_goes_away_is_not_called_damaged(tmp_path, moved):
    directory = tmp_path / "run" / "checkpoints"
    with Checkpoints(directory, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        checkpoints.wait()
        (tmp_path / "run").rename(tmp_path / "other") if moved else shutil.rmtree(tmp_path / "run")
        with pytest.raises(CheckpointError, match="checkpoints is gone: it was deleted or moved while the run used it"):
            checkpoints.save(2, make_state(2), {})


def test_a_failed_save_surfaces_when_the_run_ends(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    with full_disk():
        checkpoints.save(1, make_state(1, rows=LARGE), {})
        with pytest.raises(CheckpointError, match="1 could not be written"):
            checkpoints.close()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps() == []
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_hold_checkpoints(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/checkpoints: cannot hold checkpoints: "):
        Checkpoints(tmp_path / "file" / "checkpoints", keep=1)


# Kills

TRAINER = """
import os, random, signal, sys, time
from functools import partial
from pathlib import Path

import jax, jax.numpy as jnp, optax
from jaxft.training.checkpoint import Checkpoints
from jaxft.training.manifest import state_digest
from jaxft.training.step import initial_state

def train(directory, last):
    optimizer = optax.adam(1e-2)

    @partial(jax.jit, donate_argnums=0)
    def update(state):
        gradient = jax.tree.map(lambda w: jnp.sin(3 * w + state.step.astype(w.dtype)), state.trained)
        updates, moments = optimizer.update(gradient, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        return state._replace(step=state.step + 1, trained=trained, optimizer=moments)

    weights = {f"layer.{i}": jnp.linspace(-i, i + 1, 3000).reshape(30, 100) for i in range(4)}
    state = initial_state(weights, optimizer)
    promised = directory / "promised"
    with Checkpoints(directory / "checkpoints", keep=2) as checkpoints:
        step = 0
        if checkpoints.steps():
            step, state, progress = checkpoints.restore(state)
            assert progress == {"at": step} and int(state.step) == step
        at_least = int(promised.read_text()) if promised.exists() else 0
        assert step >= at_least, f"{at_least} had been finished, {step} was restored"
        while step < last:
            state, step = update(state), step + 1
            checkpoints.save(step, state, {"at": step})
            if step % 5 == 0:
                checkpoints.wait()
                promised.with_name("new").write_text(str(step))
                os.replace(promised.with_name("new"), promised)
    return state_digest(state)

def fork(directory, last):
    if (pid := os.fork()) == 0:
        code = 1
        try:
            print(train(directory, last), flush=True)
            code = 0
        finally:
            os._exit(code)
    return pid

root, kills, seed = Path(sys.argv[1]), *map(int, sys.argv[2:])
delay = random.Random(seed)
started = root / "killed/checkpoints"
halves = 0
for kill in range(kills):
    before = set(os.listdir(started)) if started.exists() else set()
    pid = fork(root / "killed", 10**6)
    while not started.exists() or set(os.listdir(started)) <= before:  # until it saves
        time.sleep(0.01)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the run ended by itself"
    time.sleep(delay.uniform(0, 0.2))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    halves += any("tmp" in name for name in os.listdir(started))
last = 3 + max(int(name) for name in os.listdir(started) if name.isdigit())
for name in ("killed", "whole"):
    assert os.waitpid(fork(root / name, last), 0)[1] == 0
assert all(name.isdigit() for name in os.listdir(started)), f"left by a killed run: {os.listdir(started)}"
print(halves)
"""


def test_a_run_killed_again_and_again_ends_in_the_same_bits(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    command = [sys.executable, "-c", TRAINER, tmp_path, 5, 0]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    resumed, whole, halves = result.stdout.split()
    assert resumed == whole
    assert int(halves) > 0, "no kill hit a save"
    assert "damaged" not in result.stderr, "every step is whole or not there"
