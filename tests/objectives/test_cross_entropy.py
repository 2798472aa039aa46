"""The chunked loss against the plain one: values and gradients, whatever the chunk size."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.objectives import cross_entropy as module
from jaxft.objectives.cross_entropy import cross_entropy, next_token_targets


def unembed(trained, frozen, h):
    return (h.astype(jnp.float32) @ (frozen["W"] + trained["delta"]).T).astype(jnp.float32)


def plain(trained, frozen, hidden, targets, weights):
    logits = unembed(trained, frozen, hidden)
    chosen = jax.nn.log_softmax(logits)
    return -jnp.sum(weights * jnp.take_along_axis(chosen, targets[..., None], -1)[..., 0])


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 17, 8)).astype(np.float32)
    targets = rng.integers(0, 29, (3, 17)).astype(np.int32)
    weights = rng.choice([0.0, 1.0, 0.5], (3, 17)).astype(np.float32)
    trained, frozen = ({key: rng.normal(size=(29, 8)).astype(np.float32)} for key in ("delta", "W"))
    return trained, frozen, hidden, targets, weights


@pytest.mark.core
@pytest.mark.parametrize("chunk_logits", [29 * 3, 29 * 3 * 4, 29 * 3 * 17, 10**9])
def test_equals_plain_loss(problem, monkeypatch, chunk_logits):
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk_logits)
    trained, frozen, hidden, targets, weights = problem

    def chunked(trained, hidden):
        return 3.0 * cross_entropy(unembed, trained, frozen, hidden, targets, weights, vocab_size=29)

    expected = jax.value_and_grad(lambda t, h: 3.0 * plain(t, frozen, h, targets, weights), (0, 1))(trained, hidden)
    for variant in (jax.value_and_grad(chunked, (0, 1)), jax.jit(jax.value_and_grad(chunked, (0, 1)))):
        chex.assert_trees_all_close(variant(trained, hidden), expected, rtol=2e-6, atol=2e-5)
    np.testing.assert_allclose(chunked(trained, hidden), expected[0], rtol=2e-6)


def test_never_holds_all_logits(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", 4 * 1000 * 8)
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(4, 256, 16)).astype(np.float32)
    frozen, targets = {"W": rng.normal(size=(1000, 16)).astype(np.float32)}, np.zeros((4, 256), np.int32)
    weights = np.ones((4, 256), np.float32)

    def loss(hidden):
        def head(trained, frozen, h):
            return h @ frozen["W"].T

        return cross_entropy(head, {}, frozen, hidden, targets, weights, vocab_size=1000)

    compiled = jax.jit(jax.value_and_grad(loss)).lower(hidden).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 256 * 1000 * 4 / 4


@pytest.mark.core
def test_targets_stay_inside_their_segment():
    tokens = jnp.array([[5, 6, 7, 8, 9, 0]], jnp.int32)
    segments = jnp.array([[1, 1, 1, 2, 2, 0]], jnp.int32)
    everything = jnp.ones((1, 6), bool)
    targets, weights = next_token_targets(tokens, everything, segments)
    np.testing.assert_array_equal(weights, [[1, 1, 0, 1, 0, 0]])
    np.testing.assert_array_equal(np.asarray(targets)[weights > 0], [6, 7, 9])
    answer_only = jnp.array([[False, False, True, False, True, False]])
    np.testing.assert_array_equal(next_token_targets(tokens, answer_only, segments)[1], [[0, 1, 0, 1, 0, 0]])
