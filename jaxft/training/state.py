"""What training changes, apart from what it leaves alone.

A model is taken apart by Variable type. The trained part is a flat dict of arrays, so gradients, optimizer state and
checkpoints are dicts with the same keys; the frozen part only travels along.
"""

from typing import NamedTuple

import jax
import optax
from flax import nnx

from jaxft.models.decoder import Decoder

Trained = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that a step replaces. `skipped` counts non-finite updates: in all, and in a row."""

    step: jax.Array  # int32, updates tried
    trained: Trained
    optimizer: optax.OptState
    skipped: jax.Array  # int32
    skipped_in_a_row: jax.Array  # int32


class Partition:
    """How a model comes apart into a trained dict and a frozen rest, and together again.

    `Partition(model, Adapter)` trains the adapters; `Partition(model, nnx.Param)` everything.
    """

    def __init__(self, model: nnx.Module, trained_type: type[nnx.Variable]):
        self._graph, trained, self.frozen = nnx.split(model, trained_type, ...)
        paths, self._structure = jax.tree_util.tree_flatten_with_path(trained)
        self._names = [".".join(str(key.key) for key in path[:-1]) for path, _ in paths]
        self.trained: Trained = dict(zip(self._names, (leaf for _, leaf in paths), strict=True))

    def join(self, trained: Trained, frozen: nnx.State) -> Decoder:
        """The model with these values; works on tracers."""
        leaves = [trained[name] for name in self._names]
        return nnx.merge(self._graph, jax.tree.unflatten(self._structure, leaves), frozen)
