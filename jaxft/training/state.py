"""Separates the arrays that training changes from the frozen rest.

The Variable type divides a model: `Adapter` to train adapters, `nnx.Param` to train everything. The
trained part is a flat dict of arrays, so gradients, optimizer state and checkpoints are dicts with the same
keys; the frozen part is passed along unchanged.
"""

from typing import NamedTuple

import jax
import optax
from flax import nnx

from jaxft.models.decoder import Decoder

Trained = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that a step replaces. The `skipped` counters count non-finite updates: in the run and in a row."""

    step: jax.Array  # int32, updates tried
    trained: Trained
    optimizer: optax.OptState
    skipped: jax.Array  # int32
    skipped_in_a_row: jax.Array  # int32


class Partition:
    """Splits a model into trained arrays and a frozen rest, and joins them again. Holds no arrays."""

    def __init__(self, model: nnx.Module, trained_type: type[nnx.Variable]):
        self.trained_type = trained_type
        self._graph, trained, _ = nnx.split(model, trained_type, ...)
        paths, self._structure = jax.tree_util.tree_flatten_with_path(trained)
        self.names = tuple(".".join(str(key.key) for key in path[:-1]) for path, _ in paths)

    def split(self, model: nnx.Module) -> tuple[Trained, nnx.State]:
        """The trained arrays by name, and the rest; both share their memory with the model."""
        _, trained, frozen = nnx.split(model, self.trained_type, ...)
        return dict(zip(self.names, jax.tree.leaves(trained), strict=True)), frozen

    def join(self, trained: Trained, frozen: nnx.State) -> Decoder:
        """The model with these values; works on tracers."""
        leaves = [trained[name] for name in self.names]
        return nnx.merge(self._graph, jax.tree.unflatten(self._structure, leaves), frozen)
