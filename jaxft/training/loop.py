"""The training loop, from the first batch to the last checkpoint. It reads top to bottom."""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from types import FrameType
from typing import Any, Self

import jax
import optax
from flax import nnx

from jaxft.adapters.attach import sites
from jaxft.config import Config
from jaxft.data.batch import Batch
from jaxft.data.loader import eval_batches, stream
from jaxft.models.decoder import Decoder
from jaxft.sharding.arrays import any_process, place_rows, rows_here
from jaxft.sharding.hosts import is_writer
from jaxft.training.checkpoint import CheckpointError, Checkpoints
from jaxft.training.inputs import Inputs
from jaxft.training.logging import MetricsLog, Progress
from jaxft.training.optimizer import learning_rate_schedule, make_optimizer
from jaxft.training.state import Partition, Trained, TrainState
from jaxft.training.step import Metrics, initial_state, make_eval_step, make_train_step

SAVE_SECONDS = 600
"""A run that does not say how often it saves never loses more than this."""

logger = logging.getLogger(__name__)

PREEMPTED = 75
"""Exit code of a run that was told to stop (SIGTERM, SIGINT), saved a checkpoint and can be resumed."""


class NonFiniteLossError(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not finite."""


class Preempted(Exception):
    """The run was told to stop; everything it needs to go on is in the checkpoint of `step`."""

    def __init__(self, step: int):
        super().__init__(f"stopped by a signal after step {step}; resume with resume_from_checkpoint=true")
        self.step = step


@dataclass
class Window:
    """Sums since the last line of the log."""

    loss: float = 0.0  # summed over supervised tokens
    supervised: int = 0
    tokens: int = 0

    def add(self, metrics: Metrics) -> None:
        self.loss += float(metrics.loss) * int(metrics.supervised)
        self.supervised += int(metrics.supervised)
        self.tokens += int(metrics.tokens)


@dataclass
class Bookkeeping:
    """What a checkpoint holds beside the state, as JSON: a resumed run goes on as if nothing had happened."""

    data: Any = None  # the iterator's own state
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


@dataclass(frozen=True)
class Outcome:
    """What training ended with. `model` has the weights of the best evaluation, or the last ones."""

    model: Decoder
    state: TrainState
    step: int
    exported_step: int
    bookkeeping: Bookkeeping
    seconds: float


@dataclass
class Start:
    """Where a run begins, or goes on."""

    partition: Partition
    frozen: nnx.State
    optimizer: optax.GradientTransformation
    state: TrainState
    books: Bookkeeping
    dropout: bool

    @property
    def step(self) -> int:
        return int(self.state.step)


def start(inputs: Inputs, model: Decoder, checkpoints: Checkpoints, resume: bool) -> Start:
    """The state before the first update, or that of the newest intact checkpoint.

    The trained arrays of `model` are given up to the run.
    """
    partition = Partition(model, inputs.recipe.trained_type)
    trained, frozen = partition.split(model)
    optimizer = make_optimizer(inputs.config, inputs.total_steps, partition.names)
    offload = "optimizer" in inputs.config.offload
    state, books = initial_state(trained, optimizer, inputs.mesh, offload), Bookkeeping()
    if resume:
        _, state, saved = checkpoints.restore(state)
        books = Bookkeeping.of(saved)
    adapters = [site.linear.adapter for site in sites(model) if site.linear.adapter is not None]
    dropout = any(adapter.spec.dropout for adapter in adapters)
    return Start(partition, frozen, optimizer, state, books, dropout)


def fit(inputs: Inputs, begin: Start, checkpoints: Checkpoints, log: MetricsLog, progress: Progress) -> Outcome:
    """Train from `begin`, whose state is used up, to the end.

    Raises:
        Preempted: a signal asked the run to stop; a checkpoint was saved.
        NonFiniteLossError: `max_nonfinite_steps` updates in a row were skipped.
    """
    config, began = inputs.config, time.monotonic()
    partition, frozen, state, books = begin.partition, begin.frozen, begin.state, begin.books
    step = begin.step
    dropout_seed = config.seed if begin.dropout else None
    train_step = make_train_step(
        partition, begin.optimizer, state, dropout_seed, config.router_aux_loss_coef, config.packing
    )
    eval_step = make_eval_step(partition, packed=False)
    learning_rate = learning_rate_schedule(config, inputs.total_steps)
    place = partial(place_rows, mesh=inputs.mesh, count=inputs.rows, leading=1)
    batches = stream(inputs.schedule)
    if books.data is not None:
        batches.set_state(books.data)

    def evaluate(trained: Trained) -> float:
        return mean_loss(inputs, eval_step, trained, frozen)

    if step == 0 and len(inputs.data.eval):
        log_evaluation(log, progress, 0, evaluate(state.trained))

    with StopSignal() as stop:
        saved = time.monotonic()
        clock, timed, batch = time.monotonic(), 0, None  # since the last line of the log, in this process
        while step < inputs.total_steps and not books.stopped_early:
            batch = place(next(batches)) if batch is None else batch
            state, metrics = train_step(state, frozen, batch)
            books.data = batches.get_state()
            step += 1
            batch = place(next(batches)) if step < inputs.total_steps else None  # while the device works
            metrics = jax.device_get(metrics)
            books.window.add(metrics)
            timed += int(metrics.tokens)
            gave_up = not metrics.finite and int(state.skipped_in_a_row) >= config.max_nonfinite_steps

            record = None
            if step % config.logging_steps == 0 or step == inputs.total_steps or gave_up:
                window, books.window = books.window, Window()
                books.tokens += window.tokens
                skipped = int(state.skipped)
                now = time.monotonic()
                record = {
                    "step": step,
                    "epoch": round(inputs.schedule.epoch(step), 4),
                    "loss": window.loss / max(window.supervised, 1),
                    "grad_norm": float(metrics.grad_norm),
                    "learning_rate": float(learning_rate(max(step - 1 - skipped, 0))),  # skipped: not counted
                    "tokens": books.tokens,
                    "tokens_per_second": timed / (now - clock),
                    "skipped_updates": skipped,
                }
                log.log(record)
                clock, timed = now, 0
            progress.update(step, record)
            if gave_up:
                raise NonFiniteLossError(
                    f"step {step}: loss {float(metrics.loss)}, gradient norm {float(metrics.grad_norm)}; "
                    f"{config.max_nonfinite_steps} updates in a row were not finite and were skipped. "
                    "Lower learning_rate, or look at the data of these steps"
                )

            improved = False
            if len(inputs.data.eval) and is_evaluation(inputs, step):
                pause = time.monotonic()
                loss = evaluate(state.trained)
                log_evaluation(log, progress, step, loss)
                improved = note_evaluation(books, config, step, loss)
                clock += time.monotonic() - pause
            finished = step == inputs.total_steps or books.stopped_early
            overdue = is_writer() and time.monotonic() - saved >= SAVE_SECONDS  # clocks differ
            stopping, overdue = any_process((stop.requested, overdue), inputs.mesh)
            if improved or finished or stopping or is_save(inputs, step, overdue):
                saved = time.monotonic()
                checkpoints.save(step, state, asdict(books), keep_as_best=improved)
            if stopping and not finished:
                checkpoints.wait()
                raise Preempted(step)

    checkpoints.wait()
    exported, exported_step = state, step
    if config.load_best_model_at_end and books.best_step not in (None, step):
        try:
            exported_step, exported, _ = checkpoints.restore(state, books.best_step)
        except CheckpointError as error:
            logger.warning("the best step is lost, so the last one, %d, is exported: %s", step, error)
    tuned = partition.join(exported.trained, frozen)
    return Outcome(tuned, state, step, exported_step, books, time.monotonic() - began)


def mean_loss(
    inputs: Inputs, eval_step: Callable[..., tuple[jax.Array, jax.Array]], trained: Trained, frozen: nnx.State
) -> float:
    """Cross-entropy per supervised token over the whole held-out set."""
    total, count = 0.0, 0.0
    rows, length, parts = inputs.rows, inputs.config.max_length, inputs.mesh.shape["context"]
    made = rows_here(inputs.mesh, rows)
    for batch in eval_batches(inputs.data.eval, batch_size=rows, max_length=length, parts=parts, rows=made):
        placed = place_rows(Batch(*(field[0] for field in batch)), inputs.mesh, rows)
        batch_total, batch_count = eval_step(trained, frozen, placed)
        total, count = total + float(batch_total), count + float(batch_count)
    return total / count


def is_evaluation(inputs: Inputs, step: int) -> bool:
    """Every `eval_steps` updates, or at the end of every epoch, and after the last update."""
    if step == inputs.total_steps:
        return True
    if inputs.config.eval_steps is not None:
        return step % inputs.config.eval_steps == 0
    return ends_epoch(inputs, step)


def is_save(inputs: Inputs, step: int, overdue: bool) -> bool:
    """Every `save_steps` updates; or at the end of every epoch, and when the last save is long ago."""
    if inputs.config.save_steps is not None:
        return step % inputs.config.save_steps == 0
    return ends_epoch(inputs, step) or overdue


def ends_epoch(inputs: Inputs, step: int) -> bool:
    return math.floor(inputs.schedule.epoch(step)) > math.floor(inputs.schedule.epoch(step - 1))


def log_evaluation(log: MetricsLog, progress: Progress, step: int, loss: float) -> None:
    record = {"step": step, "eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700))}
    log.log(record)
    progress.message(f"step {step}: held-out loss {loss:.4f}, perplexity {record['eval_perplexity']:.3f}")


def note_evaluation(books: Bookkeeping, config: Config, step: int, loss: float) -> bool:
    """Keep the score for early stopping and the best checkpoint; True for a new best, which NaN never is."""
    books.last_eval_loss = loss
    if loss < (math.inf if books.best_eval_loss is None else books.best_eval_loss):
        books.best_eval_loss, books.best_step, books.evaluations_without_gain = loss, step, 0
        return True
    books.evaluations_without_gain += 1
    patience = config.early_stopping_patience
    books.stopped_early = patience is not None and books.evaluations_without_gain >= patience
    return False


class StopSignal(AbstractContextManager):
    """Turns the first SIGTERM or SIGINT into a request to stop at the next step; the second acts as usual.

    Of several processes each has its own; one request stops all.
    """

    def __init__(self):
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._request) or signal.SIG_DFL  # None: not Python's
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
