"""Dynamic fine-tuning (arXiv 2508.05629): each token's loss is weighted by the token's own probability.

The gradient of -log p is the gradient of p divided by p, so tokens that the model finds unlikely pull the hardest. The
weight p cancels that division. No gradient passes through the weight.

A token of probability 0 adds nothing to this loss, so the loss does not say how good a model is. The log also has the
plain loss, as `nll`, and held-out examples are judged by the plain loss.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxft.objectives.objective import Scores, Tally
from jaxft.objectives.sft import Sft


@dataclass(frozen=True)
class Dft:
    """-p log p summed over the tokens to learn, p held constant."""

    metrics: tuple[str, ...] = ("nll",)

    @property
    def held_out(self) -> Sft:
        return Sft()

    def __call__(self, scores: Scores) -> Tally:
        plain = Sft()(scores)
        probability = jnp.exp(-jax.lax.stop_gradient(scores.losses))
        weighted = (probability * scores.losses).sum()
        return Tally(weighted, plain.count, {"nll": (jax.lax.stop_gradient(plain.loss), plain.count)})
