"""Objectives against the formulas of their papers, written plainly, and against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.config import Config
from jaxft.objectives.dft import Dft
from jaxft.objectives.objective import Scores
from jaxft.objectives.sft import Sft
from jaxft.training.recipe import OBJECTIVES

pytestmark = pytest.mark.core


def scores(seed: int = 0) -> Scores:
    """Losses from almost none to 30, and tokens that are not wanted among them."""
    rng = np.random.default_rng(seed)
    wanted = rng.random((3, 11)) < 0.7
    losses = np.where(wanted, rng.choice([1e-6, 0.05, 0.7, 3.0, 30.0], (3, 11)) * rng.uniform(0.5, 1, (3, 11)), 0)
    return Scores(jnp.asarray(losses, jnp.float32), jnp.asarray(wanted))


def test_sft_is_the_sum_over_the_tokens_to_learn():
    given = scores()
    found = Sft()(given)
    assert float(found.loss) == pytest.approx(np.asarray(given.losses, np.float64).sum(), rel=1e-6)
    assert (int(found.count), found.metrics) == (int(given.wanted.sum()), {})


def test_dft_weights_each_token_by_its_probability_and_lets_no_gradient_through_the_weight():
    torch = pytest.importorskip("torch")
    given = scores(1)
    losses = torch.tensor(np.asarray(given.losses, np.float64), requires_grad=True)
    expected = (torch.exp(-losses).detach() * losses).sum()
    expected.backward()
    value, gradient = jax.value_and_grad(lambda losses: Dft()(given._replace(losses=losses)).loss)(given.losses)
    assert float(value) == pytest.approx(expected.item(), rel=1e-6)
    gradient = np.where(np.asarray(given.wanted), np.asarray(gradient), 0)
    np.testing.assert_allclose(gradient, np.where(given.wanted, losses.grad.numpy(), 0), rtol=1e-6)
    plain, count = Dft()(given).metrics["nll"]
    assert (float(plain), float(count)) == (float(Sft()(given).loss), float(given.wanted.sum()))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_reports_what_it_says_it_reports(name):
    """And nothing but its loss has a gradient; where nothing is to be learned, every sum is 0."""
    objective, given = OBJECTIVES[name], scores(2)
    found = objective(given)
    assert tuple(found.metrics) == objective.metrics
    for metric in objective.metrics:
        gradient = jax.grad(lambda losses, metric=metric: objective(given._replace(losses=losses)).metrics[metric][0])
        assert not np.asarray(gradient(given.losses)).any()
    empty = objective(Scores(0 * given.losses, given.wanted & False))
    assert not any(map(float, jax.tree.leaves(empty)))
    assert objective.held_out.held_out is objective.held_out or objective.held_out == objective.held_out.held_out


def test_every_loss_type_of_the_config_is_an_objective():
    choices = Config.model_fields["loss_type"].annotation.__args__
    assert set(choices) == set(OBJECTIVES)
