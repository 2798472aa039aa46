"""The training loop, from the first batch to the last checkpoint. It reads top to bottom."""

import logging
import time
from dataclasses import asdict, dataclass
from functools import partial

import optax
from flax import nnx

from jaxft.adapters.attach import sites
from jaxft.config import Config
from jaxft.data.loader import stream
from jaxft.models.decoder import Decoder
from jaxft.sharding.arrays import any_process, place_rows
from jaxft.sharding.hosts import is_writer
from jaxft.training.account import Account, Bookkeeping
from jaxft.training.checkpoint import CheckpointError, Checkpoints
from jaxft.training.held_out import HeldOut, is_evaluation, log_evaluation, note_evaluation
from jaxft.training.inputs import Inputs
from jaxft.training.logging import MetricsLog, Progress
from jaxft.training.optimizer import make_optimizer
from jaxft.training.state import Partition, TrainState
from jaxft.training.step import initial_state, make_train_step
from jaxft.training.stopping import StopSignal

SAVE_SECONDS = 600
"""Seconds: the most that a run loses if its config does not set how often to save."""

WAITED_FOR, AHEAD = 0.5, 8
"""If an update takes more than WAITED_FOR seconds, the run waits for each one, so that a signal stops it at the next.
Shorter updates start one ahead of the update that is read; after AHEAD of them the run checks whether to stop."""

logger = logging.getLogger(__name__)

PREEMPTED = 75
"""Exit code of a run that was told to stop, saved a checkpoint and can be resumed."""


class Preempted(Exception):
    """The run was told to stop; everything it needs to go on is in the checkpoint of `step`."""

    def __init__(self, step: int):
        super().__init__(f"stopped by a signal after step {step}; resume with resume_from_checkpoint=true")
        self.step = step


@dataclass(frozen=True)
class Outcome:
    """The outcome of training. `model` has the weights of the best evaluation, or the last ones; `state_sha256` is the
    digest of the last state, and `skipped` its count of updates that were not finite."""

    model: Decoder
    state_sha256: str
    skipped: int
    step: int
    exported_step: int
    bookkeeping: Bookkeeping
    seconds: float


@dataclass
class Start:
    """The point at which a run begins or resumes. `fit` uses up the state."""

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
    """The state before the first update, or the state in the newest intact checkpoint.

    The run takes over the trained arrays of `model`.
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
    objective = inputs.recipe.objective
    train_step = make_train_step(
        partition, objective, begin.optimizer, state, dropout_seed, config.router_aux_loss_coef, config.packing
    )
    place = partial(place_rows, mesh=inputs.mesh, count=inputs.rows, leading=1)
    batches = stream(inputs.schedule)
    if books.data is not None:
        batches.set_state(books.data)

    if len(inputs.data.eval):
        evaluate = HeldOut.of(inputs).evaluator(partition, objective.held_out)
        if step == 0:
            log_evaluation(log, progress, 0, evaluate(state.trained, frozen))

    with StopSignal() as stop:
        saved, batch = time.monotonic(), None
        account, ahead = Account(inputs, books, log, progress), 1
        while step < inputs.total_steps and not books.stopped_early:
            batch = place(next(batches)) if batch is None else batch
            state, metrics = train_step(state, frozen, batch)
            books.data = batches.get_state()
            step += 1
            batch = place(next(batches)) if step < inputs.total_steps else None  # while the device works
            account.enter(step, metrics)
            evaluates = len(inputs.data.eval) and is_evaluation(inputs, step)
            saves = step == inputs.total_steps or is_save(inputs, step)
            if step % ahead and not (evaluates or saves):
                continue

            account.settle()
            improved = False
            if evaluates:
                pause = time.monotonic()
                found = evaluate(state.trained, frozen)
                log_evaluation(log, progress, step, found)
                improved = note_evaluation(books, config, step, found.loss / found.count)
                account.pause(time.monotonic() - pause)
            finished = step == inputs.total_steps or books.stopped_early
            overdue = is_writer() and is_overdue(config, time.monotonic() - saved)  # clocks differ
            slow = account.seconds > WAITED_FOR
            flags = (stop.requested, overdue, slow, checkpoints.saving())
            stopping, overdue, slow, saving = any_process(flags, inputs.mesh)
            if not saving:
                checkpoints.wait()  # report a full disk now, not at the next save
            ahead = 1 if slow else AHEAD
            if improved or finished or stopping or overdue or saves:
                saved = time.monotonic()
                checkpoints.save(step, state, asdict(books), keep_as_best=improved)
            if stopping:
                checkpoints.wait()
                raise Preempted(step)

        checkpoints.wait()

    digest, skipped = checkpoints.digest_of(step, state), int(state.skipped)
    trained, exported_step = state.trained, step
    del state  # the optimizer's part makes room for the best step
    if config.load_best_model_at_end and books.best_step not in (None, step):
        try:
            trained, exported_step = checkpoints.restore_trained(trained, books.best_step), books.best_step
        except CheckpointError as error:
            logger.warning("the best step is lost, so the last one, %d, is exported: %s", step, error)
    tuned = partition.join(trained, frozen)
    return Outcome(tuned, digest, skipped, step, exported_step, books, time.monotonic() - began)


def is_save(inputs: Inputs, step: int) -> bool:
    """Every `save_steps` updates, or at the end of every epoch."""
    if inputs.config.save_steps is not None:
        return step % inputs.config.save_steps == 0
    return inputs.schedule.ends_epoch(step)


def is_overdue(config: Config, seconds: float) -> bool:
    """Whether the last save is too long ago for a run that does not say how often it saves."""
    return config.save_steps is None and seconds >= SAVE_SECONDS
