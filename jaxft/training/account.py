"""Sums and logs the metrics of updates; reads them from the devices while the next update runs."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import jax

from jaxft.training.inputs import Inputs
from jaxft.training.logging import MetricsLog, Progress
from jaxft.training.optimizer import learning_rate_schedule
from jaxft.training.step import Metrics


class NonFiniteLossError(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not finite."""


@dataclass
class Window:
    """Sums of the metrics since the last line of the log."""

    loss: float = 0.0  # sum over everything that the objective counts
    count: int = 0
    tokens: int = 0
    measured: dict[str, tuple[float, float]] = field(default_factory=dict)  # name -> its sum and its count

    def add(self, metrics: Metrics) -> None:
        self.loss += float(metrics.loss) * int(metrics.count)
        self.count += int(metrics.count)
        self.tokens += int(metrics.tokens)
        for name, (total, count) in metrics.measured.items():
            total_before, count_before = self.measured.get(name, (0.0, 0.0))
            self.measured[name] = total_before + float(total), count_before + float(count)


@dataclass
class Bookkeeping:
    """The JSON that a checkpoint holds beside the state, so that a resumed run goes on as if nothing had happened."""

    data: Any = None  # the state of the data iterator
    tokens: int = 0
    window: Window = field(default_factory=Window)
    best_eval_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    last_eval_loss: float | None = None

    @classmethod
    def of(cls, progress: dict[str, Any]) -> Self:
        return cls(**progress | {"window": Window(**progress["window"])})


class Update(NamedTuple):
    """An update that was started on the devices; `step` is its number."""

    step: int
    metrics: Metrics


class Account:
    """Reads the metrics of each update after the next update has started, or earlier when `settle` is called.

    Attributes:
        seconds: duration of the update that was read last.
    """

    def __init__(
        self,
        inputs: Inputs,
        books: Bookkeeping,
        log: MetricsLog,
        progress: Progress,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._config, self._schedule, self._total_steps = inputs.config, inputs.schedule, inputs.total_steps
        self._books, self._log, self._progress, self._clock = books, log, progress, clock
        self._learning_rate = learning_rate_schedule(inputs.config, inputs.total_steps)
        self._running: Update | None = None
        self._logged, self._tokens = clock(), 0  # when the last line was written, and tokens since, in this process
        self._read = clock()
        self.seconds = 0.0

    def enter(self, step: int, metrics: Metrics) -> None:
        """Take in an update that was just started. Waits for the update before it.

        Raises:
            NonFiniteLossError: `max_nonfinite_steps` updates in a row were skipped.
        """
        before, self._running = self._running, Update(step, metrics)
        if before is not None:
            self._settle(before)

    def settle(self) -> None:
        """Wait for the last update, so that the books include it. Raises as `enter` does."""
        last, self._running = self._running, None
        if last is not None:
            self._settle(last)

    def pause(self, seconds: float) -> None:
        """Leave this time out of the tokens per second."""
        self._logged += seconds
        self._read += seconds

    def _settle(self, update: Update) -> None:
        step, metrics = update.step, jax.device_get(update.metrics)
        now = self._clock()
        self.seconds, self._read = now - self._read, now
        self._books.window.add(metrics)
        self._tokens += int(metrics.tokens)
        gave_up = int(metrics.skipped_in_a_row) >= self._config.max_nonfinite_steps
        record = None
        if step % self._config.logging_steps == 0 or step == self._total_steps or gave_up:
            record = self._record(step, metrics, now)
            self._log.log(record)
        self._progress.update(step, record)
        if gave_up:
            raise NonFiniteLossError(
                f"step {step}: loss {float(metrics.loss)}, gradient norm {float(metrics.grad_norm)}; "
                f"{self._config.max_nonfinite_steps} updates in a row were not finite and were skipped. "
                "Lower learning_rate, or look at the data of these steps"
            )

    def _record(self, step: int, metrics: Metrics, now: float) -> dict[str, float]:
        """Make a line of the log and start a new window."""
        window, self._books.window = self._books.window, Window()
        self._books.tokens += window.tokens
        skipped = int(metrics.skipped)
        record = {
            "step": step,
            "epoch": round(self._schedule.epoch(step), 4),
            "loss": window.loss / max(window.count, 1),
            **{name: total / max(count, 1.0) for name, (total, count) in window.measured.items()},
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": float(self._learning_rate(max(step - 1 - skipped, 0))),  # without skipped
            "tokens": self._books.tokens,
            "tokens_per_second": self._tokens / (now - self._logged),
            "skipped_updates": skipped,
        }
        self._logged, self._tokens = now, 0
        return record
