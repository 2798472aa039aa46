"""One update beside plain autodiff on single examples; what is skipped, drawn, donated and compiled."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxft
from jaxft.adapters import lora
from jaxft.adapters.attach import attach
from jaxft.adapters.targets import LoraConfig
from jaxft.config import Config
from jaxft.data.loader import Batch
from jaxft.models.linear import Adapter
from jaxft.training import step as step_module
from jaxft.training.optimizer import make_optimizer
from jaxft.training.state import Partition
from jaxft.training.step import initial_state, loss_sum, make_eval_step, make_train_step

VOCABULARY, LENGTH = 41, 24
MODEL = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
#: (tokens, supervised tokens) of examples that differ in both.
EXAMPLES = [(5, 3), (9, 8), (5, 1), (9, 4), (5, 2), (9, 7), (5, 1), (12, 9)]


@pytest.fixture(scope="module")
def directory(random_checkpoint):
    return random_checkpoint(MODEL)


class Setup:
    """A model in parts, with adapters whose every entry matters, or trained as a whole."""

    def __init__(self, directory, trained_type=Adapter, **lora_settings):
        self.base = jaxft.load_model(directory)
        self.model = self.base
        if trained_type is Adapter:
            config = LoraConfig(**{"r": 3, "lora_alpha": 6, "use_dora": True} | lora_settings)
            self.model = attach(self.base, config, jax.random.key(1))
        self.partition = Partition(self.model, trained_type)
        trained, self.frozen = self.partition.split(self.model)
        random = np.random.default_rng(2)
        self.trained = {
            name: array + random.normal(0, 0.1, array.shape).astype(np.float32)
            if name.endswith(".B")
            else array
            for name, array in trained.items()
        }

    def state(self, optimizer):
        """A state of its own, which a step may consume."""
        return initial_state(jax.tree.map(jnp.copy, self.trained), optimizer)

    def joined(self):
        return self.partition.join(self.trained, self.frozen)

    def step(self, optimizer, dropout_seed=None):
        return make_train_step(self.partition, optimizer, self.state(optimizer), dropout_seed)


def examples(seed=0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and masks; the supervised tokens stand at the end."""
    random = np.random.default_rng(seed)
    return [
        (random.integers(0, VOCABULARY, length, dtype=np.int32), np.arange(length) >= length - supervised)
        for length, supervised in EXAMPLES
    ]


def batch(rows: list[list[tuple[np.ndarray, np.ndarray]]], accumulation: int = 1) -> Batch:
    """Rows of examples as [accumulation, rows / accumulation, LENGTH]."""
    tokens, segments, positions = (np.zeros((len(rows), LENGTH), np.int32) for _ in range(3))
    mask = np.zeros((len(rows), LENGTH), bool)
    for row, packed in enumerate(rows):
        start = 0
        for segment, (ids, learned) in enumerate(packed, 1):
            end = start + len(ids)
            tokens[row, start:end], mask[row, start:end] = ids, learned
            segments[row, start:end], positions[row, start:end] = segment, np.arange(len(ids))
            start = end
    arrays = (tokens, mask, segments, positions)
    return Batch(*(array.reshape(accumulation, -1, LENGTH) for array in arrays))


def alone(chosen) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    return [[example] for example in chosen]


def plain_losses(model, tokens: jax.Array) -> jax.Array:
    """-log p of tokens[1:], from the logits of one example."""
    logits = jax.nn.log_softmax(model(tokens[None])[0])
    return -logits[jnp.arange(len(tokens) - 1), tokens[1:]]


def reference(setup: Setup, chosen):
    """Mean loss over the supervised tokens of all examples, and its gradient, an example at a time."""

    @jax.jit
    @jax.value_and_grad
    def one(trained, tokens, weights):
        return jnp.sum(plain_losses(setup.partition.join(trained, setup.frozen), tokens) * weights[1:])

    found = [one(setup.trained, ids, learned.astype(np.float32)) for ids, learned in chosen]
    count = np.float32(sum(learned[1:].sum() for _, learned in chosen))
    return jax.tree.map(lambda *parts: sum(parts) / count, *found)


def close(found: dict, expected: dict, rtol=1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = np.linalg.norm(found[name] - value) / max(np.linalg.norm(value), 1e-12)
        assert error < rtol, f"{name}: relative error {error:.1e}"


SGD = optax.sgd(1.0)  # an update is minus the gradient


@pytest.mark.core
@pytest.mark.parametrize("trained_type", [Adapter, nnx.Param], ids=["adapters", "everything"])
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "no-jit"])
def test_loss_and_gradient_are_those_of_the_mean_over_all_supervised_tokens(directory, trained_type, jit):
    setup, chosen = Setup(directory, trained_type), examples()
    loss, gradient = reference(setup, chosen)
    with jax.disable_jit(not jit):
        state, metrics = setup.step(SGD)(setup.state(SGD), setup.frozen, batch(alone(chosen), 4))
    assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-6)
    squares = sum(np.square(np.asarray(g, np.float64)).sum() for g in gradient.values())
    assert float(metrics.grad_norm) == pytest.approx(math.sqrt(squares), rel=1e-5)
    assert int(metrics.supervised) == sum(supervised for _, supervised in EXAMPLES)
    assert int(metrics.tokens) == sum(length for length, _ in EXAMPLES)
    assert bool(metrics.finite)
    found = {name: np.asarray(setup.trained[name] - array) for name, array in state.trained.items()}
    close(found, gradient)
    assert min(np.linalg.norm(g) for g in gradient.values()) > 1e-4, "every parameter matters"


@pytest.mark.core
@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_equals_one_large_batch(directory, accumulation):
    """Micro-batches with 1 to 20 supervised tokens, and the last with none at all."""
    setup, chosen = Setup(directory), examples()
    chosen[-1] = (chosen[-1][0], np.zeros_like(chosen[-1][1]))
    optimizer = optax.sgd(0.5, momentum=0.9)

    def updated(accumulation: int):
        step, state, losses = setup.step(optimizer), setup.state(optimizer), []
        for _ in range(3):
            state, metrics = step(state, setup.frozen, batch(alone(chosen), accumulation))
            losses.append([float(metrics.loss), float(metrics.grad_norm), int(metrics.supervised)])
        return state.trained, losses

    (expected, whole), (found, parts) = updated(1), updated(accumulation)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    close(found, expected)
    assert whole[2][0] < whole[0][0]


def test_a_batch_without_a_supervised_token_changes_nothing(directory):
    setup = Setup(directory)
    nothing = [(ids, np.zeros_like(learned)) for ids, learned in examples()]
    state, metrics = setup.step(SGD)(setup.state(SGD), setup.frozen, batch(alone(nothing)))
    assert (float(metrics.loss), float(metrics.grad_norm), int(metrics.supervised)) == (0, 0, 0)
    chex.assert_trees_all_equal(state.trained, setup.trained)


def test_packed_examples_lose_what_they_lose_alone(directory):
    """Token by token, in rows that hold several."""
    setup, chosen = Setup(directory), examples(3)
    rows = [chosen[:3], chosen[3:6], chosen[6:]]
    single = jax.jit(lambda tokens: plain_losses(setup.joined(), tokens))
    wanted = np.concatenate([single(ids)[learned[1:]] for ids, learned in chosen])
    step = make_eval_step(setup.partition)
    packed = Batch(*(array[0] for array in batch(rows)))
    found = []
    for row, token in np.argwhere(packed.loss_mask):
        mask = np.zeros_like(packed.loss_mask)
        mask[row, token] = True
        total, count = step(setup.trained, setup.frozen, packed._replace(loss_mask=mask))
        assert float(count) == 1
        found.append(float(total))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    total, count = step(setup.trained, setup.frozen, packed)
    assert float(total) == pytest.approx(sum(wanted), rel=1e-6)
    assert int(count) == len(wanted) == sum(supervised for _, supervised in EXAMPLES)


# Updates that are not finite


def planted(frozen: nnx.State, value: float) -> nnx.State:
    """The frozen arrays with one number replaced, in the middle of the model."""
    leaves, structure = jax.tree.flatten(frozen)
    largest = max(range(len(leaves)), key=lambda index: leaves[index].size)
    leaves[largest] = leaves[largest].at[(1,) * leaves[largest].ndim].set(value)
    return jax.tree.unflatten(structure, leaves)


@pytest.fixture(scope="module")
def adam():
    config = Config(model_name_or_path="m", output_dir="o", datasets=["d"], weight_decay=0.1)
    return lambda setup: make_optimizer(config, 100, setup.partition.names)


@pytest.mark.core
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "inf"])
def test_an_update_that_is_not_finite_is_skipped_and_counted(directory, adam, value):
    setup, rows = Setup(directory), batch(alone(examples()), 2)
    optimizer = adam(setup)
    step, bad = setup.step(optimizer), planted(setup.frozen, value)
    state, metrics = step(setup.state(optimizer), setup.frozen, rows)
    before = jax.device_get((state.trained, state.optimizer))
    counts = []
    for _ in range(2):
        state, metrics = step(state, bad, rows)
        assert not bool(metrics.finite)
        assert not math.isfinite(float(metrics.loss))
        counts.append([int(state.step), int(state.skipped), int(state.skipped_in_a_row)])
    chex.assert_trees_all_equal(jax.device_get((state.trained, state.optimizer)), before)
    state, metrics = step(state, setup.frozen, rows)
    counts.append([int(state.step), int(state.skipped), int(state.skipped_in_a_row)])
    assert counts == [[2, 1, 1], [3, 2, 2], [4, 2, 0]]
    assert bool(metrics.finite)

    # As if the skipped ones had not been: the schedule and Adam's own count did not move.
    undisturbed = setup.state(optimizer)
    for _ in range(2):
        undisturbed, _ = step(undisturbed, setup.frozen, rows)
    after = (state.trained, state.optimizer), (undisturbed.trained, undisturbed.optimizer)
    chex.assert_trees_all_equal(*map(jax.device_get, after))


def test_an_adapter_that_is_not_finite_stays_as_it_is(directory, adam):
    setup = Setup(directory)
    name = next(name for name in setup.trained if name.endswith("up_proj.adapter.A"))
    setup.trained[name] = setup.trained[name].at[1, 0, 0].set(np.inf)
    optimizer = adam(setup)
    step, state = setup.step(optimizer), setup.state(optimizer)
    before = jax.device_get((state.trained, state.optimizer))
    for count in (1, 2, 3):
        state, metrics = step(state, setup.frozen, batch(alone(examples())))
        assert (int(state.skipped), int(state.skipped_in_a_row), bool(metrics.finite)) == (count, count, False)
    chex.assert_trees_all_equal(jax.device_get((state.trained, state.optimizer)), before)


def test_a_gradient_that_overflows_is_skipped_though_the_loss_is_finite(directory, adam):
    """B is zero, so the loss does not know of the scale; the gradient does, and its square overflows."""
    setup = Setup(directory, use_dora=False, lora_alpha=1e25)
    setup.trained = {name: a * (not name.endswith(".B")) for name, a in setup.trained.items()}
    optimizer = adam(setup)
    state, metrics = setup.step(optimizer)(setup.state(optimizer), setup.frozen, batch(alone(examples())))
    assert math.isfinite(float(metrics.loss))
    assert not bool(metrics.finite)
    assert int(state.skipped) == 1
    chex.assert_trees_all_equal(state.trained, setup.trained)


# Dropout


@pytest.fixture(scope="module")
def dropping(directory) -> Setup:
    return Setup(directory, lora_dropout=0.4, use_dora=False)


def losses(setup: Setup, seed: int | None, rows: Batch, steps: int = 3) -> list[float]:
    """Of updates that change nothing."""
    optimizer = optax.set_to_zero()
    step, state, found = setup.step(optimizer, seed), setup.state(optimizer), []
    for _ in range(steps):
        state, metrics = step(state, setup.frozen, rows)
        found.append(float(metrics.loss))
    return found


def test_dropout_depends_on_seed_and_step_alone(dropping):
    rows = batch(alone(examples()), 2)
    first = losses(dropping, 7, rows)
    assert losses(dropping, 7, rows) == first
    assert len({*first, *losses(dropping, 8, rows)}) == 6
    without = losses(dropping, None, rows)
    assert without[0] == without[1] == without[2]
    assert without[0] not in first


def test_dropout_is_another_in_every_micro_batch(dropping):
    same = examples()[:2]
    single, twice = batch(alone(same), 1), batch(alone(same + same), 2)
    assert losses(dropping, None, single, 1) == pytest.approx(losses(dropping, None, twice, 1), rel=1e-6)
    difference = losses(dropping, 7, single, 1)[0] - losses(dropping, 7, twice, 1)[0]
    assert abs(difference) > 1e-4


def test_every_draw_has_a_key_of_its_own(dropping, monkeypatch):
    """Per micro-batch, layer and linear: 2 x 3 x 7 in an update."""
    keys, drop = [], lora._dropout

    def record(x, rate, key):
        keys.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
        return drop(x, rate, key)

    monkeypatch.setattr(lora, "_dropout", record)
    with jax.disable_jit():
        losses(dropping, 7, batch(alone(examples()[:2]), 2), steps=2)
    assert len(keys) == 2 * 2 * 3 * 7
    assert len(set(keys)) == len(keys)


def test_evaluation_drops_nothing(dropping):
    rows = batch(alone(examples()))
    total, count = make_eval_step(dropping.partition)(
        dropping.trained, dropping.frozen, Batch(*(array[0] for array in rows))
    )
    assert float(total / count) == pytest.approx(losses(dropping, None, rows, 1)[0], rel=1e-6)


# Buffers and programs


def test_the_state_is_given_up_and_the_base_is_not(directory, adam):
    setup = Setup(directory)
    optimizer = adam(setup)
    state = setup.state(optimizer)
    after, _ = setup.step(optimizer)(state, setup.frozen, batch(alone(examples())))
    large = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert all(leaf.is_deleted() for leaf in large)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((setup.frozen, after)))


def test_the_program_is_traced_once(directory, adam, monkeypatch):
    monkeypatch.setattr(step_module, "loss_sum", chex.assert_max_traces(loss_sum, n=1))
    setup = Setup(directory, lora_dropout=0.1)
    optimizer = adam(setup)
    step, state = setup.step(optimizer, 3), setup.state(optimizer)
    for seed in range(6):
        state, _ = step(state, setup.frozen, batch(alone(examples(seed)), 2))
    assert int(state.step) == 6


def test_only_adapters_have_gradients_and_moments(directory, adam):
    setup = Setup(directory)
    optimizer = adam(setup)
    state = setup.state(optimizer)
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ends = {f"{name}.adapter.{part}" for name in modules for part in ("A", "B", "magnitude")}
    assert {name.split(".", 5)[-1] for name in state.trained} == ends
    assert len(state.trained) == len(ends)
    paths = [path for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer) if leaf.ndim]
    assert sorted(path[-1].key for path in paths) == sorted([*state.trained, *state.trained])
    # r (in + out) + out, in each of three layers
    sizes = [(16, 16), (8, 16), (8, 16), (16, 16), (24, 16), (24, 16), (16, 24)]
    count = 3 * sum(3 * (rows + columns) + rows for rows, columns in sizes)
    assert sum(array.size for array in state.trained.values()) == count
    assert all(array.dtype == jnp.float32 for array in state.trained.values())


def test_taking_apart_and_joining_is_the_identity(directory):
    for trained_type in (Adapter, nnx.Param):
        setup = Setup(directory, trained_type)
        again = setup.partition.join(*setup.partition.split(setup.model))
        chex.assert_trees_all_equal(nnx.state(again), nnx.state(setup.model))
    assert set(setup.partition.names) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        *(f"model.layers.0.0.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")),
        *(f"model.layers.0.0.self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"model.layers.0.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }
