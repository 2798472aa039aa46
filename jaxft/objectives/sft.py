"""Supervised fine-tuning: the mean negative log-probability of the tokens to learn."""

from dataclasses import dataclass
from typing import Self

import jax.numpy as jnp

from jaxft.objectives.objective import Scores, Tally


@dataclass(frozen=True)
class Sft:
    """Cross-entropy of the next token."""

    metrics: tuple[str, ...] = ()

    @property
    def held_out(self) -> Self:
        return self

    def __call__(self, scores: Scores) -> Tally:
        return Tally(scores.losses.sum(), scores.wanted.sum(dtype=jnp.float32), {})
