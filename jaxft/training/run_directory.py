"""The output directory: one run, one owner, and proof that a resumed run is the run that was started.

`run.json` and, beside it, `config.yaml` record what the run was started with; it resumes only where that is as it was
(`jaxft.training.same_run`). A lock, which the kernel releases when its process dies, keeps a second run out.

Of several processes the first owns the directory and writes; the others know what it holds.
"""

import fcntl
import hashlib
import json
import logging
import os
import socket
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from jaxft.hub.stage import clear_stale
from jaxft.limits import write_error
from jaxft.sharding import hosts
from jaxft.training.begun import RunDirectoryError, refuse_place
from jaxft.training.manifest import sealed
from jaxft.training.same_run import compare, environment

logger = logging.getLogger(__name__)

_RECORDED = {
    "run_id": str,
    "fingerprints": dict,
    "versions": dict,
    "devices": dict,
    "started": str,
    "resumed": list,
    "finished": str | None,
}
_RECORDED_LATER = {"updates": int}
_LOCK = ".lock"
_LISTED = 5  # names in one message


class RunDirectory:
    """An output directory that this run owns until `close`; made by `open_run`.

    Attributes:
        path: the directory.
        record: what `run.json` holds; change it with `write_run`.
        resumed: there is a checkpoint to go on from.
    """

    def __init__(self, path: Path, lock: int | None, record: dict[str, Any], resumed: bool):
        self.path, self.record, self.resumed = path, record, resumed
        self._lock = lock
        self.config_file = path / "config.yaml"
        self.run_file = path / "run.json"
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.adapter, self.model = path / "adapter", path / "model"
        self.report_file = path / "report.html"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the next run in."""
        if self._lock is not None:
            os.close(self._lock)

    def write_run(self, updates: Mapping[str, Any]) -> None:
        """Put these keys into `run.json`, all or none."""
        record = {**self.record, **updates}
        record.pop("sha256", None)  # of a run that had finished
        self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        if self._lock is not None:
            _replace(self.run_file, (json.dumps(record, indent=2) + "\n").encode())
        self.record = record

    def finish(self, updates: Mapping[str, Any]) -> None:
        """`write_run`, with the time at which the run finished, and sealed: what is exported must be as it was."""
        record = {**self.record, **updates, "finished": _now()}
        record["config_sha256"] = hashlib.sha256(self.config_file.read_bytes()).hexdigest()
        record.pop("sha256", None)
        self._write(sealed(record))

    def truncate_metrics(self, step: int) -> None:
        """Drop a torn last line of `metrics.jsonl`, and those after this step, which come again.

        A line is a JSON object with its `step`, and stands in the file before the checkpoint of that step.

        Raises:
            RunDirectoryError: another line is not such an object.
        """
        if self._lock is None or not self.metrics_file.exists():
            return
        with open(self.metrics_file, "rb") as file:
            lines = file.readlines()
        kept = []
        for number, line in enumerate(lines, 1):
            whole = line.endswith(b"\n")
            try:
                wanted = json.loads(line)["step"] <= step
            except (ValueError, TypeError, KeyError) as error:
                if whole:
                    raise RunDirectoryError(
                        f"{self.metrics_file}:{number}: not a JSON object with a step ({error}); "
                        "remove the line, or move the file away"
                    ) from None
                wanted = False
            if wanted:
                kept.append(line if whole else line + b"\n")
        _replace(self.metrics_file, b"".join(kept))


def check_vacant(output_dir: str | Path, resume: bool) -> None:
    """Refuse early what `open_run` would refuse for the place, and for what lies there. Only looks.

    Raises:
        RunDirectoryError: it holds something that is not to be resumed, is in use, no directory, or not writable.
    """
    path = Path(output_dir)
    refuse_place(path)
    if not path.exists():
        return
    _refuse_contents(path, resume)
    if (path / _LOCK).exists():
        os.close(_acquire(path, look=True))


def check_same(output_dir: str | Path, resume: bool, config_yaml: str, fingerprints: Mapping[str, str]) -> None:
    """Refuse early what `open_run` would refuse to go on with. Only looks.

    Raises:
        RunDirectoryError: the run there was started with another config or other fingerprints, or cannot be resumed.
    """
    path = Path(output_dir)
    if not path.exists() or not _refuse_contents(path, resume):
        return
    run = RunDirectory(path, None, {}, resumed=resume and _has_checkpoint(path / "checkpoints"))
    if run.resumed:
        _compare(run, _read_record(run.run_file), config_yaml, fingerprints)
    else:
        _refuse_to_start_over(run)


def open_run(output_dir: str | Path, resume: bool, config_yaml: str, fingerprints: Mapping[str, str]) -> RunDirectory:
    """Take possession of an output directory, for a new run or to go on with the one in it.

    All processes of the run call it. With `resume` and no checkpoint there yet, the run starts from the beginning: a
    job that may be killed at any time can always ask to resume.

    Args:
        output_dir: made if missing.
        resume: go on with the run in it.
        config_yaml: all keys, as `Config.to_yaml` writes them.
        fingerprints: what decides the result besides the config, name -> digest: data, tokenizer, base, ...

    Raises:
        RunDirectoryError: it belongs to a running process, holds something else, cannot be written, or the
            run in it was started with another config or other fingerprints.
        HostsError: other processes do not see what process 0 writes there.
    """
    path = Path(output_dir)
    run = _open(path, resume, config_yaml, dict(fingerprints)) if hosts.is_writer() else None
    try:
        record, resumed = hosts.share(lambda: (run.record, run.resumed))
        hosts.require_shared(path)
    except BaseException:
        if run is not None:
            run.close()
        raise
    return run or RunDirectory(path, None, record, resumed)


def _open(path: Path, resume: bool, config_yaml: str, fingerprints: dict[str, str]) -> RunDirectory:
    refuse_place(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        there = _contents(path)
        if there and not ((path / _LOCK).exists() or (path / "run.json").exists()):
            raise _occupied(path, there)
        lock = _acquire(path)
    except OSError as error:
        raise RunDirectoryError(
            f"output_dir {path} cannot be written: {error.strerror}; choose another output_dir"
        ) from error
    try:
        return _open_locked(path, lock, resume, config_yaml, fingerprints)
    except BaseException:
        os.close(lock)
        raise


def _open_locked(path: Path, lock: int, resume: bool, config_yaml: str, fingerprints: dict[str, str]) -> RunDirectory:
    there = _refuse_contents(path, resume)
    clear_stale(path)
    run = RunDirectory(path, lock, {}, resumed=resume and _has_checkpoint(path / "checkpoints"))
    if run.resumed:
        recorded = _read_record(run.run_file)
        _compare(run, recorded, config_yaml, fingerprints)
        run.write_run({**recorded, **environment(), "resumed": [*recorded["resumed"], _now()], "finished": None})
    else:
        if there:
            _refuse_to_start_over(run)
        if resume:
            logger.warning("%s holds no checkpoint yet: starting from the beginning", path)
        run.metrics_file.unlink(missing_ok=True)
        identity = {"run_id": str(uuid.uuid4()), "fingerprints": fingerprints}
        times = {"started": _now(), "resumed": [], "finished": None}
        run.write_run({**identity, **environment(), **times})
    _replace(run.config_file, config_yaml.encode())
    return run


def _contents(path: Path) -> list[str]:
    """What is there, apart from the lock and what a killed process was about to write."""
    return sorted(p.name for p in path.iterdir() if p.name != _LOCK and not (p.name[0] == "." and p.suffix == ".tmp"))


def _refuse_contents(path: Path, resume: bool) -> list[str]:
    there = _contents(path)
    if there and not (resume and "run.json" in there):
        raise _occupied(path, there)
    return there


def _refuse_to_start_over(run: RunDirectory) -> None:
    """A run that lost its checkpoints is not begun anew where its result would be replaced."""
    if run.adapter.exists() or run.model.exists() or _read_record(run.run_file)["finished"]:
        raise RunDirectoryError(
            f"{run.path}: the run in it has finished, and there is no checkpoint to resume from; "
            "choose another output_dir"
        )


def _occupied(path: Path, there: list[str]) -> RunDirectoryError:
    listed = ", ".join(there[:_LISTED]) + (f" and {len(there) - _LISTED} more" if len(there) > _LISTED else "")
    if "run.json" in there:
        advice = "choose another output_dir, or set resume_from_checkpoint: true to go on with the run in it"
    else:
        advice = "it is not the output of an earlier run (no run.json); choose another output_dir"
    return RunDirectoryError(f"output_dir {path} is not empty (it holds {listed}): {advice}")


def _acquire(path: Path, look: bool = False) -> int:
    """An open file that holds the lock. `look`: without a word in it of whose it is."""
    lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if look:
            return lock
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BlockingIOError:
        owner = os.pread(lock, 1000, 0).decode()
        os.close(lock)
        raise RunDirectoryError(
            f"output_dir {path} is in use by {owner}; wait for it, stop it, or choose another output_dir"
        ) from None
    except OSError:
        os.close(lock)
        raise
    return lock


def _has_checkpoint(checkpoints: Path) -> bool:
    return checkpoints.is_dir() and any(step.name.isdigit() for step in checkpoints.iterdir())


def _read_record(run_file: Path) -> dict[str, Any]:
    try:
        record = json.loads(run_file.read_bytes())
        if missing := _RECORDED.keys() - record.keys():
            raise ValueError(f"no {', '.join(sorted(missing))}")
        known = {key: kind for key, kind in (_RECORDED | _RECORDED_LATER).items() if key in record}
        if wrong := [key for key, kind in known.items() if not isinstance(record[key], kind)]:
            raise ValueError(f"{wrong[0]} is {json.dumps(record[wrong[0]])[:80]}")
    except (ValueError, AttributeError) as error:
        raise RunDirectoryError(
            f"{run_file} is damaged ({error}): what the run was started with is unknown; choose another output_dir"
        ) from None
    return record


def _compare(run: RunDirectory, recorded: dict[str, Any], config_yaml: str, fingerprints: Mapping[str, str]) -> None:
    """Refuse another run than the one that was started; warn of what may differ."""
    if not run.config_file.exists():
        raise RunDirectoryError(f"{run.config_file} is missing: what the run was started with is unknown")
    try:
        refused, told = compare(recorded, run.config_file.read_bytes(), config_yaml, fingerprints)
    except ValueError as error:
        raise RunDirectoryError(
            f"{run.config_file} is damaged ({error}): what the run was started with is unknown; "
            "put it back, or choose another output_dir"
        ) from None
    if refused:
        raise RunDirectoryError(
            f"{run.path}: cannot resume, this is not the run that was started there:"
            + "".join(f"\n  {line}" for line in refused)
            + "\nPut it back as it was, or choose another output_dir for a new run; "
            "with adapter_name_or_path it goes on from an adapter."
        )
    for line in told:
        logger.warning("%s", line)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _replace(path: Path, data: bytes) -> None:
    """Write a file, all or nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunDirectoryError(f"{path} cannot be written: {write_error(error)}") from error
