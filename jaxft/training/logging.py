"""Reports on a run while it trains: a metrics file, the trackers that the user chose, and a progress bar.

`metrics.jsonl` holds the records of a run: one JSON object per line, on disk before the update after next begins.
Trackers get the same records; nobody needs a tracker to read them. No record is left out: a loss that is not finite is
written as the string "NaN", "Infinity" or "-Infinity", which every strict JSON reader accepts and which `float()` (and
JavaScript's `Number()`) turns back into the number.

A record is a flat dict with the key `step` (updates done). The keys of a training record: `epoch`, `loss`,
`grad_norm`, `learning_rate`, `tokens` and `skipped_updates` (both since the run began), `tokens_per_second`
(since the record before), and the objective's other metrics under their own names. An evaluation record has
`eval_loss` and other keys that begin with `eval_`.
"""

import importlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from time import monotonic
from types import ModuleType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from jaxft.limits import writing

Scalar = bool | int | float | str
Record = dict[str, Scalar]


@dataclass(frozen=True)
class Sink:
    """A receiver of records besides the file."""

    log: Callable[[Record], None]
    close: Callable[[], None]


class MetricsLog:
    """Appends records to a file and passes them to the sinks; closes both on leaving the `with` block.

    Opening the file again removes a line that a killed process left unfinished.

    Args:
      path: None for a process that is not the writer: its records go nowhere.
    """

    def __init__(self, path: str | os.PathLike[str] | None, sinks: Sequence[Sink] = ()):
        self._sinks = tuple(sinks)
        self._closing = ExitStack()
        self._file = None
        if path is not None:
            self._file = open(path, "a+b")  # noqa: SIM115
            self._closing.callback(self._close_file)
            self._file.seek(0)
            self._file.truncate(len(_finished_lines(self._file.read())))
        for sink in self._sinks:
            self._closing.callback(sink.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.close()

    def log(self, record: Mapping[str, Any]) -> None:
        """Write one record. Numbers may come from Python, NumPy or JAX; the call waits for a JAX array.

        Raises:
          ValueError: no integer `step`, or a value that is neither a single number nor a string.
          OSError: the file cannot be written; names it.
        """
        plain = {key: _plain(key, value) for key, value in record.items()}
        if type(plain.get("step")) is not int:
            raise ValueError(f"metrics record: `step` must be an integer, got {plain.get('step')!r}")
        line = {key: _strict(value) for key, value in plain.items()}
        if self._file is not None:
            with self._writing():
                self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
                self._file.flush()
        for sink in self._sinks:
            sink.log(plain)

    def _close_file(self) -> None:
        with self._writing():  # closing tries again to write what is still buffered
            self._file.close()

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self._file.name, "; then resume")


def read_metrics(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a metrics file in the order of writing, without a line that a kill left unfinished.

    Raises:
      ValueError: a line that is not a JSON object, by file and line.
    """
    records = []
    for number, line in enumerate(_finished_lines(Path(path).read_bytes()).splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error}); remove the line") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: not a JSON object; remove the line")
        records.append({key: float(v) if v in _NOT_FINITE else v for key, v in record.items()})
    return records


def check_trackers(names: Sequence[str]) -> list[ModuleType]:
    """The trackers' packages, imported.

    Raises:
      ValueError: an unknown name, or a package that is not installed or cannot be imported.
    """
    if unknown := [name for name in names if name not in _TRACKERS]:
        raise ValueError(f"report_to: unknown tracker {unknown[0]!r}; choose {', '.join(_TRACKERS)}")
    return [_import_tracker(name) for name in names]


def open_sinks(
    names: Sequence[str], output_dir: str | os.PathLike[str], run_name: str, config: Mapping[str, Any]
) -> list[Sink]:
    """Trackers by name: tensorboard (files in `output_dir`/tensorboard), wandb, trackio.

    wandb and trackio log to the project `jaxft`, unless WANDB_PROJECT or TRACKIO_PROJECT names another, and
    go on with the same run when `output_dir` is resumed, by an id kept there in the file `tracking_id`.

    Args:
      config: shown beside the metrics, unchanged; the caller makes sure that it holds no secret.

    Raises:
      ValueError: an unknown name, or a package that is not installed.
    """
    modules = check_trackers(names)  # all of them before any of them opens
    directory = Path(output_dir)
    return [_TRACKERS[n].open(m, directory, run_name, config) for n, m in zip(names, modules, strict=True)]


class Progress:
    """Shows how far a run is: a bar on a terminal, plain lines elsewhere.

    Args:
      total_steps: updates in the whole run.
      initial_step: updates done before this process began.
    """

    def __init__(self, total_steps: int, initial_step: int = 0, console: Console | None = None):
        self._total = total_steps
        self._console = console or Console()
        self._start: tuple[int, float] | None = None  # after the first update: compiling does not count
        self._bar = Bar(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[summary]}"),
            TextColumn("eta {task.fields[eta]}"),
            console=self._console,
            disable=not self._console.is_interactive,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=initial_step, summary="", eta="?")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, step: int, record: Mapping[str, Any] | None = None) -> None:
        """Note that `step` updates are done. Shows the numbers of a training record in the bar or as a line."""
        eta = self._time_left(step)
        self._bar.update(self._task, completed=step, eta=eta)
        if record is None:
            return
        if self._console.is_interactive:
            self._bar.update(self._task, summary=_summary(record, ("loss", "tokens_per_second")))
        else:
            self.message(f"step {step}/{self._total}  {_summary(record, record)}  eta {eta}")

    def message(self, text: str) -> None:
        """Print above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _time_left(self, step: int) -> str:
        now = monotonic()
        if self._start is None:
            self._start = step, now
        first_step, began = self._start
        if step == first_step:
            return "?"
        seconds = (now - began) / (step - first_step) * (self._total - step)
        return str(timedelta(seconds=round(seconds)))


_NOT_FINITE = ("NaN", "Infinity", "-Infinity")

_SHOWN: dict[str, Callable[[float], str]] = {
    "loss": lambda loss: f"loss {loss:#.4g}",
    "grad_norm": lambda norm: f"grad {norm:.3g}",
    "learning_rate": lambda rate: f"lr {rate:.1e}".replace("e-0", "e-") if rate else "lr 0",
    "tokens_per_second": lambda speed: f"{speed:.0f} tok/s",
    "skipped_updates": lambda count: f"{count} skipped" if count else "",
}


_NOT_SHOWN = {"step", "epoch", "tokens"}


def _summary(record: Mapping[str, Any], keys: Iterable[str]) -> str:
    """The numbers of a record as text; a number without its own format appears under its name."""
    texts = (
        _SHOWN[key](record[key]) if key in _SHOWN else f"{key} {record[key]:#.4g}"
        for key in keys
        if key in record
        if key not in _NOT_SHOWN
    )
    return "  ".join(filter(None, texts))


def _finished_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


def _plain(key: str, value: Any) -> Scalar:
    if isinstance(value, Scalar):
        return value
    if getattr(value, "ndim", None) == 0:
        return value.item()
    raise ValueError(f"metrics record: `{key}` is {type(value).__name__}; log one number or a string")


def _strict(value: Scalar) -> Scalar:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


@dataclass(frozen=True)
class _Tracker:
    package: str
    open: Callable[[ModuleType, Path, str, Mapping[str, Any]], Sink]


def _open_tensorboard(tensorboardx: ModuleType, output_dir: Path, run_name: str, config: Mapping[str, Any]) -> Sink:
    writer = tensorboardx.SummaryWriter(str(output_dir / "tensorboard"))
    writer.add_text("run", f"# {run_name}\n```json\n{json.dumps(config, indent=2, default=str)}\n```")

    def log(record: Record) -> None:
        for tag, value in _tagged(record).items():
            writer.add_scalar(tag, value, record["step"])
        writer.flush()

    return Sink(log, writer.close)


def _open_wandb(wandb: ModuleType, output_dir: Path, run_name: str, config: Mapping[str, Any]) -> Sink:
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or "jaxft",
        name=os.environ.get("WANDB_NAME") or run_name,
        id=os.environ.get("WANDB_RUN_ID") or _tracking_id(output_dir),
        resume=os.environ.get("WANDB_RESUME") or "allow",
        dir=os.environ.get("WANDB_DIR") or str(output_dir),
        config=dict(config),
        allow_val_change=True,  # a resumed run may differ, as in resume_from_checkpoint
    )
    # wandb's own step may not go back, as it does when a run resumes from its last checkpoint
    run.define_metric("*", step_metric="step")
    return Sink(lambda record: run.log({"step": record["step"], **_tagged(record)}), run.finish)


def _open_trackio(trackio: ModuleType, output_dir: Path, run_name: str, config: Mapping[str, Any]) -> Sink:
    run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT") or "jaxft",
        name=f"{run_name}-{_tracking_id(output_dir)}",  # trackio resumes by name
        resume="allow",
        config=dict(config),
        embed=False,
    )
    return Sink(lambda record: run.log(_tagged(record), step=record["step"]), trackio.finish)


_TRACKERS = {
    "tensorboard": _Tracker("tensorboardX", _open_tensorboard),
    "wandb": _Tracker("wandb", _open_wandb),
    "trackio": _Tracker("trackio", _open_trackio),
}


def _import_tracker(name: str) -> ModuleType:
    package = _TRACKERS[name].package
    try:
        return importlib.import_module(package)
    except ImportError as error:
        reason = "" if getattr(error, "name", None) == package else f" ({error})"
        raise ValueError(
            f'report_to: {name} needs the package {package}{reason}: pip install "jaxft[{name}]", or take it out'
        ) from None


def _tracking_id(output_dir: Path) -> str:
    path = output_dir / "tracking_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text()


def _tagged(record: Record) -> dict[str, float]:
    """The numbers of a record under the names that trackers group by: eval/loss, train/loss."""
    tags = {key: f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}" for key in record}
    return {tags[key]: v for key, v in record.items() if key != "step" and not isinstance(v, str)}
