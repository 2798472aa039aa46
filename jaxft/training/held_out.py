"""The loss on held-out examples: when a run asks for it, what it is, and what follows from it."""

import math
from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxft.config import Config
from jaxft.data.batch import Batch
from jaxft.data.loader import eval_batches
from jaxft.data.tokenized import TokenizedSet
from jaxft.sharding.arrays import place_rows, rows_here
from jaxft.training.account import Bookkeeping
from jaxft.training.inputs import Inputs
from jaxft.training.logging import MetricsLog, Progress
from jaxft.training.state import Trained

EvalStep = Callable[[Trained, nnx.State, Batch], tuple[jax.Array, jax.Array]]


def summed_loss(
    eval_step: EvalStep, trained: Trained, frozen: nnx.State, examples: TokenizedSet, mesh: Mesh, rows: int, length: int
) -> tuple[float, float]:
    """Cross-entropy summed over all supervised tokens of the examples, and how many there are.

    Args:
        rows: of a batch, over all devices. Decides memory and speed, not the result.
        length: tokens of the longest example, at most; the mesh's `context` divides it.
    """
    parts, made = mesh.shape["context"], rows_here(mesh, rows)
    total, count = 0.0, 0.0
    for batch in eval_batches(examples, batch_size=rows, max_length=length, parts=parts, rows=made):
        placed = place_rows(Batch(*(field[0] for field in batch)), mesh, rows)
        batch_total, batch_count = eval_step(trained, frozen, placed)
        total, count = total + float(batch_total), count + float(batch_count)
    return total, count


def is_evaluation(inputs: Inputs, step: int) -> bool:
    """Every `eval_steps` updates, or at the end of every epoch, and after the last update."""
    if step == inputs.total_steps:
        return True
    if inputs.config.eval_steps is not None:
        return step % inputs.config.eval_steps == 0
    return inputs.schedule.ends_epoch(step)


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
