import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import chisquare

from jaxft.generation.sampling import Sampling, choose, nucleus, row_keys

LOGITS = np.array([1.5, -0.4, 0.3, 0.3, -2.0, 0.9])


ROWS = 5000


def draws(temperature: float, top_p: float | None = None, step: int = 0) -> np.ndarray:
    """One token of each of `ROWS` rows with the same logits and prompt."""
    keys = row_keys(0, [np.array([3, 1], np.int32)] * ROWS)
    sampling = Sampling(keys, jnp.float32(temperature), None if top_p is None else jnp.float32(top_p))
    return np.asarray(jax.jit(choose)(jnp.tile(jnp.float32(LOGITS), (ROWS, 1)), jnp.int32(step), sampling))


@pytest.mark.core
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
def test_frequencies_are_those_of_the_softmax(temperature):
    counts = np.bincount(draws(temperature), minlength=len(LOGITS))
    expected = softmax(LOGITS / temperature)
    assert chisquare(counts, ROWS * expected).pvalue > 1e-3
    assert chisquare(counts, ROWS * softmax(LOGITS / (1.2 * temperature))).pvalue < 1e-3, "the test can fail"


def test_successive_steps_are_independent():
    first, second = draws(1.0, step=0), draws(1.0, step=1)
    pairs = np.zeros((6, 6))
    np.add.at(pairs, (first, second), 1)
    p = softmax(LOGITS)
    assert chisquare(pairs.ravel(), ROWS * np.outer(p, p).ravel()).pvalue > 1e-3


@pytest.mark.parametrize("temperature, top_p", [(1.0, 0.3), (1.0, 0.7), (2.0, 0.7), (1.0, 0.99)])
def test_top_p_draws_from_the_nucleus_of_the_tempered_distribution(temperature, top_p):
    p = softmax(LOGITS / temperature)
    order = np.argsort(-p, kind="stable")
    size = np.searchsorted(np.cumsum(p[order]), top_p) + 1
    expected = np.zeros_like(p)
    expected[order[:size]] = p[order[:size]] / p[order[:size]].sum()
    counts = np.bincount(draws(temperature, top_p), minlength=len(p))
    assert set(np.flatnonzero(counts)) == set(order[:size])
    if size > 1:
        assert chisquare(counts[order[:size]], ROWS * expected[order[:size]]).pvalue > 1e-3


def test_nucleus_takes_lower_ids_first_among_equals_and_always_one():
    logits = jnp.log(jnp.array([[0.2, 0.2, 0.2, 0.2, 0.2], [0.05, 0.5, 0.1, 0.3, 0.05]]))
    expected = {0.3: ([1, 1, 0, 0, 0], [0, 1, 0, 0, 0]), 1e-9: ([1, 0, 0, 0, 0], [0, 1, 0, 0, 0])}
    expected[0.82] = [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]
    for top_p, sets in expected.items():
        np.testing.assert_array_equal(nucleus(logits, jnp.float32(top_p)), np.array(sets, bool))


@pytest.mark.parity
def test_nucleus_agrees_with_transformers():
    torch = pytest.importorskip("torch")
    from transformers import TopPLogitsWarper

    logits = np.random.default_rng(0).normal(0, 2, (50, 200)).astype(np.float32)
    for top_p in (0.1, 0.5, 0.9, 0.995):
        theirs = TopPLogitsWarper(top_p)(None, torch.tensor(logits)).isfinite().numpy()
        np.testing.assert_array_equal(nucleus(jnp.asarray(logits), jnp.float32(top_p)), theirs)


def test_no_sampling_takes_the_lowest_id_among_the_most_likely():
    logits = jnp.array([[0.0, 3.0, 3.0, -jnp.inf], [1.0, 1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(choose(logits, jnp.int32(0), None), [1, 0])


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-44])
def test_a_temperature_near_zero_takes_the_most_likely(temperature):
    assert set(draws(temperature)) == {0}
    assert set(draws(temperature, 0.5)) == {0}


def test_streams_depend_on_seed_prompt_and_copy_alone():
    a, b = np.array([5, 6], np.int32), np.array([6, 5], np.int32)

    def data(seed, prompts):
        return [tuple(key) for key in np.asarray(jax.random.key_data(row_keys(seed, prompts))).tolist()]

    streams = data(7, [a, b, a, a])
    assert len(set(streams)) == 4
    assert data(7, [a, a, b]) == [streams[0], streams[2], streams[1]]
    assert not set(data(8, [a, b, a, a])) & set(streams)
