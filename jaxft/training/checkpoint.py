"""Saves checkpoints and restores them bit for bit, or reports why it cannot.

Orbax writes a step into a temporary directory and renames it when it is whole. A step has two items.
`state` is every array of the train state under its dotted name. `manifest` describes them (`jaxft.training.manifest`).
A step that does not match its manifest is damaged and never used: a run resumes from the newest intact step.

No host needs to hold an array whole: each process writes the parts on its devices, and reads those that the template
puts there, so mesh and number of processes may change in between. All processes of a run make the same calls, and
a step that one process finds damaged counts as damaged for all.

One run owns the directory at a time (`jaxft.training.run_directory` sees to it): opening it removes
what a killed process left half written or half deleted.
"""

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp

from jaxft.sharding import hosts
from jaxft.training import orbax_arrays
from jaxft.training.digest import digests
from jaxft.training.manifest import (
    describe,
    differences,
    digest_of_result,
    named,
    read_manifest,
    sealed,
    state_digest,
)
from jaxft.training.state import Trained, TrainState

logger = logging.getLogger(__name__)

_OVERHEAD = 1 << 20  # bytes of a checkpoint beside its arrays, generously
_OUTDATED = "outdated"  # directory of steps being deleted
_LISTED = 5  # differences named in one message


class CheckpointError(ValueError):
    """A checkpoint cannot be written or used; the files on disk are unchanged."""


class DamagedCheckpointError(CheckpointError):
    """A step does not match its manifest."""


class Restored(NamedTuple):
    """The contents of a checkpoint."""

    step: int
    state: TrainState
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run: the newest `keep` and the best.

    >>> checkpoints = Checkpoints(directory, keep=2)  # doctest: +SKIP
    >>> checkpoints.save(10, state, {"data": iterator.get_state()})  # doctest: +SKIP
    >>> step, state, progress = checkpoints.restore(template=state)  # doctest: +SKIP

    Args:
        directory: made if missing.
        keep: how many of the newest steps to keep, 1 or more.
    """

    def __init__(self, directory: str | Path, keep: int):
        if keep < 1:
            raise ValueError(f"keep at least one checkpoint, not {keep}")
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._damaged: list[int] = []  # newer than the step the run goes on from
        self._pending: int | None = None  # being written
        self._saved: tuple[int, str] | None = None  # the step saved last, and `state_digest` of its state
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(use_compression=False),  # trained floats hardly compress
            "manifest": ocp.JsonCheckpointHandler(),
        }
        orbax_arrays.hush()
        options = ocp.CheckpointManagerOptions(todelete_subdir=_OUTDATED, single_host_load_and_broadcast=True)
        try:
            if hosts.is_writer():
                self.directory.mkdir(parents=True, exist_ok=True)
                for pattern in ("*.orbax-checkpoint-tmp*", _OUTDATED):
                    for left_behind in self.directory.glob(pattern):
                        shutil.rmtree(left_behind)
            hosts.barrier()
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        except OSError as error:
            raise CheckpointError(f"{self.directory}: cannot hold checkpoints: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None or hosts.count() == 1:
            self.close()
        else:
            self._manager.close()  # the others may not come to agree on what is to be kept

    def close(self) -> None:
        """Finish the save in progress; raises CheckpointError if it failed."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def steps(self) -> list[int]:
        """Steps written completely, oldest first, without those that `restore` found damaged."""
        self.wait()
        return sorted(set(self._manager.all_steps()) - set(self._damaged))

    def best_step(self) -> int | None:
        """The newest step saved with `keep_as_best`; None if there is none."""
        for step in reversed(self.steps()):
            try:
                if self._manifest(step)["best"]:
                    return step
            except DamagedCheckpointError as error:
                logger.warning("%s; it cannot be the best checkpoint", error)
        return None

    def save(self, step: int, state: TrainState, progress: dict[str, Any], *, keep_as_best: bool = False) -> None:
        """Start to write a checkpoint; it counts from the next `wait`, `steps`, `save` or `close` on.

        The arrays are copied to the hosts before this returns, so the state may be donated to the next update.

        Args:
            step: greater than that of every checkpoint there.
            state: all finite.
            progress: everything else that the run needs to resume, as JSON.
            keep_as_best: keep this step, and no longer an earlier best one, whatever comes after it.

        Raises:
            CheckpointError: a value is not finite, the disk lacks space, or this or the previous save failed.
                The checkpoints there before are untouched.
        """
        self._require_directory()
        if (there := self.steps()) and there[-1] >= step:
            raise CheckpointError(f"{self.directory}: cannot save step {step} after step {there[-1]}")
        arrays = named(state)
        found = digests(arrays)
        for name, digest in found.items():
            if not digest.finite:
                raise CheckpointError(f"step {step} is not saved: {name} holds values that are not finite")
        self._delete(self._damaged)  # nothing can be read from them, and their steps come again
        self._damaged = []
        self._require_space(step, sum(array.nbytes for array in arrays.values()))
        described = describe(arrays, found)
        manifest = {"step": step, "best": keep_as_best, "progress": progress, "arrays": described}
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), manifest=ocp.args.JsonSave(sealed(manifest)))
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            raise self._failure(step, error) from error
        self._pending = step
        self._saved = step, digest_of_result(described)

    def digest_of(self, step: int, state: TrainState) -> str:
        """`state_digest` of the state after `step`, which was computed when it was saved."""
        if self._saved is not None and self._saved[0] == step:
            return self._saved[1]
        return state_digest(state)

    def saving(self) -> bool:
        """Whether this process still writes. When none does, `wait` takes no time and reports a failure early."""
        return self._pending is not None and self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Wait until the save in progress is on disk, then delete the steps no longer to be kept.

        Raises:
            CheckpointError: the save failed.
        """
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure(step, error) from error
        self._require_directory()
        there = self.steps()
        kept = {*there[-self._keep :], self.best_step()}
        self._delete(set(there) - kept)

    def restore(self, template: TrainState, step: int | None = None) -> Restored:
        """The newest intact checkpoint, or the checkpoint of one step.

        Without `step`, damaged checkpoints are skipped, with a warning that says which, why and what is
        used instead; the next save deletes them.

        Args:
            template: a state of this run; gives names, shapes, dtypes and shardings.
            step: as from `best_step`.

        Raises:
            DamagedCheckpointError: the given step is damaged.
            CheckpointError: no such step, none intact, or arrays that differ from the template's.
        """
        there = self.steps()
        if step is not None:
            if step not in there:
                raise CheckpointError(f"{self.directory}: no checkpoint of step {step}; there are {there}")
            return self._restore(template, step)
        problems: dict[int, str] = {}
        for candidate in reversed(there):
            try:
                restored = self._restore(template, candidate)
            except DamagedCheckpointError as error:
                problems[candidate] = str(error)
                continue
            for problem in problems.values():
                logger.warning("%s; going on from step %d instead", problem, candidate)
            self._damaged += problems
            return restored
        found = "".join(f"\n  {problem}" for problem in problems.values()) or " there are none"
        raise CheckpointError(f"{self.directory}: no intact checkpoint to go on from:{found}")

    def restore_trained(self, like: Trained, step: int) -> Trained:
        """Only the trained arrays of one step, so that the optimizer needs no room.

        Raises:
            DamagedCheckpointError: the step is damaged.
            CheckpointError: there is no such step, or it holds other arrays.
        """
        if step not in (there := self.steps()):
            raise CheckpointError(f"{self.directory}: no checkpoint of step {step}; there are {there}")
        wanted = {f"trained.{name}": array for name, array in like.items()}
        manifest = self._manifest(step)
        recorded = {name: array for name, array in manifest["arrays"].items() if name.startswith("trained.")}
        return dict(zip(like, self._intact(step, recorded, wanted).values(), strict=True))

    def _delete(self, steps: Iterable[int]) -> None:
        """Move steps aside, then delete them: whenever the process is killed, no half step is left."""
        for step in steps:
            self._manager.delete(step)
            if hosts.is_writer():
                shutil.rmtree(self.directory / _OUTDATED)

    def _restore(self, template: TrainState, step: int) -> Restored:
        manifest = self._manifest(step)
        arrays = self._intact(step, manifest["arrays"], named(template))
        state = jax.tree.unflatten(jax.tree.structure(template), list(arrays.values()))
        return Restored(step, state, manifest["progress"])

    def _intact(
        self, step: int, recorded: dict[str, dict[str, Any]], wanted: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """The wanted arrays, compared with their records in the manifest."""
        if differing := differences(recorded, wanted):
            listed = "".join(f"\n  {line}" for line in differing[:_LISTED])
            more = f"\n  and {len(differing) - _LISTED} more" if len(differing) > _LISTED else ""
            raise CheckpointError(f"{self._path(step)} is not of this model and optimizer:{listed}{more}")
        arrays, fault = orbax_arrays.read(self._path(step) / "state", wanted)
        if faults := list(filter(None, hosts.exchange(fault))):
            raise DamagedCheckpointError(f"{self._path(step)} is damaged: {faults[0]}")
        found = describe(arrays, digests(arrays))
        if changed := [name for name in recorded if found[name] != recorded[name]]:
            raise DamagedCheckpointError(
                f"{self._path(step)} is damaged: {changed[0]} does not match its digest"
                + (f", nor do {len(changed) - 1} more" if changed[1:] else "")
            )
        return arrays

    def _manifest(self, step: int) -> dict[str, Any]:
        body, fault = hosts.share(lambda: read_manifest(self._path(step) / "manifest" / "metadata", step))
        if fault:
            raise DamagedCheckpointError(f"{self._path(step)} is damaged: {fault}")
        return body

    def _require_space(self, step: int, size: int) -> None:
        if not hosts.is_writer():
            return
        free = shutil.disk_usage(self.directory).free
        if free < size + _OVERHEAD:
            raise CheckpointError(
                f"step {step} is not saved: {self.directory} has {free / 1e6:.1f} MB of free space, "
                f"a checkpoint takes {(size + _OVERHEAD) / 1e6:.1f} MB: make room there; {self._last_good()}"
            )

    def _require_directory(self) -> None:
        if hosts.is_writer() and not self.directory.is_dir():
            raise CheckpointError(
                f"{self.directory} is gone: it was deleted or moved while the run used it, and its checkpoints with it"
            )

    def _failure(self, step: int, error: Exception) -> CheckpointError:
        self._require_directory()
        return CheckpointError(
            f"{self._path(step)} could not be written: {orbax_arrays.reason(error)}; {self._last_good()}"
        )

    def _last_good(self) -> str:
        there = sorted(self._manager.all_steps())
        if not there:
            return "there is none before it"
        return f"the checkpoint of step {there[-1]} is there to resume from"

    def _path(self, step: int) -> Path:
        return self.directory / str(step)
