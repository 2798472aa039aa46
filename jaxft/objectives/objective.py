"""Objectives: what a run minimises, as a function of how likely the model finds each target token.

An objective takes the scores of a batch and gives sums. The step divides them once, over all micro-batches and devices,
so that each mean covers the whole update. To add an objective, write one like `jaxft.objectives.sft` and name it in
`jaxft.training.recipe`; its other metrics appear in the log and in the report under their own names.

Axes: B rows, T tokens.
"""

from typing import NamedTuple, Protocol

import jax

Sum = tuple[jax.Array, jax.Array]
"""A sum and the number of its terms: two float32 scalars."""


class Scores(NamedTuple):
    """For each token, how unlikely the model finds the next token.

    Attributes:
        losses: [B, T] float32, negative log-probability of the target; 0 where it is not wanted.
        wanted: [B, T] bool, where there is a target to learn.
    """

    losses: jax.Array
    wanted: jax.Array


class Tally(NamedTuple):
    """The sums of a batch. The loss of an update is `loss` / `count`; `metrics` are divided likewise."""

    loss: jax.Array
    count: jax.Array
    metrics: dict[str, Sum]


class Objective(Protocol):
    """A pure function of scores.

    Attributes:
        metrics: the names of the metrics in its tallies, besides the loss.
        held_out: the objective by which held-out examples are judged.
    """

    metrics: tuple[str, ...]

    @property
    def held_out(self) -> "Objective": ...

    def __call__(self, scores: Scores) -> Tally: ...
