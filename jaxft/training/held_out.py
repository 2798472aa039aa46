"""Computes the loss on held-out examples, decides when a run evaluates, and records what follows from the loss."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.config import Config
from jaxft.data.batch import Batch
from jaxft.data.loader import eval_batches, row_length
from jaxft.data.tokenized import TokenizedSet
from jaxft.models.config import DecoderConfig
from jaxft.models.kernels import Backend, packs
from jaxft.objectives.objective import Objective, Tally
from jaxft.sharding.arrays import on_host, place, place_rows, rows_here
from jaxft.training.account import Bookkeeping
from jaxft.training.inputs import Inputs
from jaxft.training.logging import MetricsLog, Progress
from jaxft.training.state import Partition, Trained
from jaxft.training.step import make_eval_step, nothing

AHEAD = 8
"""Number of batches on their way to the devices while the host makes more."""


class HeldOut:
    """Held-out examples, and how they reach the devices.

    A row holds several examples if this does not change the attention kernel. Each token sees only its own example and
    the loss is a sum over tokens, so packing does not change the loss.

    Args:
        decoder, backend, dtype: properties of the model that decide the kernel.
        rows: rows of a batch, over all devices. They affect memory and speed, not the result.
        max_length: upper limit on the tokens of an example; a multiple of the mesh's `context`.
        long_rows: rows have `max_length` tokens, as in packed training; otherwise they fit the longest example.
    """

    def __init__(
        self,
        examples: TokenizedSet,
        decoder: DecoderConfig,
        backend: Backend,
        dtype: str,
        *,
        rows: int,
        max_length: int,
        long_rows: bool,
    ):
        self._examples, self._mesh, self._rows = examples, backend.mesh, rows
        self.packed = packs(decoder, backend, jnp.dtype(dtype))
        self._length = max_length if self.packed and long_rows else row_length([examples], max_length, self._parts)

    @classmethod
    def of(cls, inputs: Inputs) -> Self:
        """The held-out examples of a run."""
        c = inputs.config
        backend, rows = Backend(c.attn_implementation, inputs.mesh), inputs.rows
        return cls(
            inputs.data.eval,
            inputs.decoder,
            backend,
            c.dtype,
            rows=rows,
            max_length=c.max_length,
            long_rows=c.packing,
        )

    @property
    def _parts(self) -> int:
        return self._mesh.shape["context"]

    def batches(self) -> Iterator[Batch]:
        """The batches of this process, each [rows here, T]."""
        here = rows_here(self._mesh, self._rows)
        for batch in eval_batches(
            self._examples, batch_size=self._rows, row_length=self._length, packing=self.packed, rows=here
        ):
            yield Batch(*(field[0] for field in batch))

    def evaluator(self, partition: Partition, objective: Objective) -> Callable[[Trained, nnx.State], Tally]:
        """A function from trained and frozen arrays to the objective's sums over all examples, as floats."""
        step, everywhere = make_eval_step(partition, objective, self.packed), NamedSharding(self._mesh, P())

        def evaluate(trained: Trained, frozen: nnx.State) -> Tally:
            zeros = np.zeros(len(self._examples), np.float32)  # there are at most as many batches as examples
            tallies = jax.tree.map(lambda _: place(zeros, everywhere), nothing(objective))
            running = deque(maxlen=AHEAD)
            for number, batch in enumerate(self.batches()):
                if len(running) == AHEAD:
                    running[0].count.block_until_ready()  # limits the batches that lie on the devices
                tallies = step(trained, frozen, place_rows(batch, self._mesh, self._rows), tallies, number)
                running.append(tallies)
            return jax.tree.map(lambda sums: float(on_host(sums).astype(np.float64).sum()), tallies)

        return evaluate


def is_evaluation(inputs: Inputs, step: int) -> bool:
    """Whether the run evaluates: every `eval_steps` updates or at the end of each epoch, and after the last update."""
    if step == inputs.total_steps:
        return True
    if inputs.config.eval_steps is not None:
        return step % inputs.config.eval_steps == 0
    return inputs.schedule.ends_epoch(step)


def log_evaluation(log: MetricsLog, progress: Progress, step: int, found: Tally) -> None:
    loss = found.loss / found.count
    record = {"step": step, "eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700))}
    record |= {f"eval_{name}": total / max(count, 1.0) for name, (total, count) in found.metrics.items()}
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
