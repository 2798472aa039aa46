"""How well a model predicts held-out examples: training's own loss, over a whole set."""

import math
from typing import NamedTuple

from jax.sharding import Mesh

from jaxft.data.tokenized import TokenizedSet
from jaxft.models.decoder import Decoder
from jaxft.models.kernels import Backend
from jaxft.models.linear import Adapter
from jaxft.objectives.sft import Sft
from jaxft.sharding.mesh import batch_ways
from jaxft.training.held_out import HeldOut
from jaxft.training.state import Partition


class Score(NamedTuple):
    """Cross-entropy in nats: the mean over `tokens` supervised tokens."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))


def score(model: Decoder, examples: TokenizedSet, *, batch_size: int, max_length: int, mesh: Mesh) -> Score:
    """The model's loss on the examples: the sum over all supervised tokens, divided once.

    Args:
        model: on `mesh`, with or without adapter.
        batch_size: examples per device at a time. Decides memory and speed, not the result.
        max_length: tokens of the longest example, at most; the mesh's `context` divides it.

    Raises:
        ValueError: the loss is not finite.
    """
    partition, backend = Partition(model, Adapter), Backend(model.attn_implementation, mesh)
    rows = batch_size * batch_ways(mesh)
    held_out = HeldOut(examples, model.config, backend, model.dtype, rows=rows, max_length=max_length, long_rows=False)
    found = held_out.evaluator(partition, Sft())(*partition.split(model))
    if not math.isfinite(found.loss):
        raise ValueError(
            f"the loss is {found.loss}; look for NaN or inf in the weights of the model and of its adapter"
        )
    return Score(found.loss / found.count, int(found.count))
