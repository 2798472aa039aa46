"""One update beside plain autodiff on single examples; what is skipped, dropped, donated and traced.

Compiling a step takes longer than all its updates here, so tests share steps, and each is traced once.
"""

import math
from collections.abc import Callable
from copy import copy

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
from jaxft.data.batch import Batch
from jaxft.models.linear import Adapter
from jaxft.objectives.objective import Tally
from jaxft.objectives.sft import Sft
from jaxft.training.optimizer import make_optimizer
from jaxft.training.state import Partition, TrainState
from jaxft.training.step import initial_state, make_eval_step, make_train_step

pytestmark = pytest.mark.usefixtures("quick_compiles")

VOCABULARY, LENGTH, LAYERS = 41, 24, 3
MODEL = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
#: (tokens, supervised tokens) of the examples.
EXAMPLES = [(5, 3), (9, 8), (5, 1), (9, 4), (5, 2), (9, 7), (5, 1), (9, 5)]
SGD = optax.sgd(1.0)  # an update is minus the gradient

Example = tuple[np.ndarray, np.ndarray]


class Model:
    """A model in parts; adapters, if that is what is trained, have no entry that is zero."""

    def __init__(self, directory, trained_type: type[nnx.Variable] = Adapter, **settings):
        self.whole = jaxft.load_model(directory)
        if trained_type is Adapter:
            config = LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | settings)
            self.whole = attach(self.whole, config, jax.random.key(1))
        self.partition = Partition(self.whole, trained_type)
        trained, self.frozen = self.partition.split(self.whole)
        random = np.random.default_rng(2)
        self.trained = {
            name: random.normal(0, 0.1, array.shape).astype(np.float32) if name.endswith(".B") else array
            for name, array in trained.items()
        }

    def state(self, optimizer: optax.GradientTransformation) -> TrainState:
        """A state that a step may consume."""
        return initial_state(jax.tree.map(jnp.array, self.trained), optimizer)

    def step(self, optimizer: optax.GradientTransformation, dropout_seed: int | None = None) -> Callable:
        """A training step that may be traced once for every number of micro-batches."""
        return make_train_step(self.partition, Sft(), optimizer, self.state(optimizer), dropout_seed)


@pytest.fixture(scope="module")
def directory(random_checkpoint):
    return random_checkpoint(MODEL)


@pytest.fixture(scope="module")
def model(directory) -> Model:
    return Model(directory, use_dora=True)


@pytest.fixture(scope="module")
def dropping(directory) -> Model:
    return Model(directory, target_modules=["q_proj"], lora_dropout=0.4)


@pytest.fixture(scope="module")
def sgd_step(model):
    return model.step(SGD)


@pytest.fixture(scope="module")
def adam(model) -> optax.GradientTransformation:
    config = Config(model_name_or_path="m", output_dir="o", datasets=["d"], weight_decay=0.1)
    return make_optimizer(config, 100, model.partition.names)


@pytest.fixture(scope="module")
def adam_step(model, adam):
    """For batches of two micro-batches; a second trace is an error."""
    partition = copy(model.partition)
    partition.join = chex.assert_max_traces(partition.join, n=1)
    return make_train_step(partition, Sft(), adam, model.state(adam))


def examples(seed: int = 0) -> list[Example]:
    """Tokens and masks; the supervised tokens stand at the end."""
    random = np.random.default_rng(seed)
    return [
        (random.integers(0, VOCABULARY, length, dtype=np.int32), np.arange(length) >= length - supervised)
        for length, supervised in EXAMPLES
    ]


def packed(rows: list[list[Example]], accumulation: int = 1) -> Batch:
    """Rows of examples as [accumulation, rows / accumulation, LENGTH]."""
    tokens, segments, positions = (np.zeros((len(rows), LENGTH), np.int32) for _ in range(3))
    mask = np.zeros((len(rows), LENGTH), bool)
    for row, chosen in enumerate(rows):
        start = 0
        for segment, (ids, learned) in enumerate(chosen, 1):
            end = start + len(ids)
            tokens[row, start:end], mask[row, start:end] = ids, learned
            segments[row, start:end], positions[row, start:end] = segment, np.arange(len(ids))
            start = end
    arrays = (tokens, mask, segments, positions)
    return Batch(*(array.reshape(accumulation, -1, LENGTH) for array in arrays))


def alone(chosen: list[Example], accumulation: int = 1) -> Batch:
    """An example to a row."""
    return packed([[example] for example in chosen], accumulation)


def unlearned(example: Example) -> Example:
    return example[0], np.zeros_like(example[1])


def without_axis(batch: Batch) -> Batch:
    return Batch(*(array.reshape(-1, LENGTH) for array in batch))


def plain_losses(model, tokens: jax.Array) -> jax.Array:
    """-log p of tokens[1:], from the logits of one example."""
    logits = jax.nn.log_softmax(model(tokens[None])[0])
    return -logits[jnp.arange(len(tokens) - 1), tokens[1:]]


def reference(model: Model, chosen: list[Example]):
    """Mean loss over the supervised tokens of all examples, and its gradient, an example at a time."""

    @jax.jit
    @jax.value_and_grad
    def one(trained, tokens, weights):
        return jnp.sum(plain_losses(model.partition.join(trained, model.frozen), tokens) * weights[1:])

    found = [one(model.trained, ids, learned.astype(np.float32)) for ids, learned in chosen]
    count = np.float32(sum(learned[1:].sum() for _, learned in chosen))
    return jax.tree.map(lambda *parts: sum(parts) / count, *found)


def close(found: dict, expected: dict, rtol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = np.linalg.norm(found[name] - value) / np.linalg.norm(value)
        assert error < rtol, f"{name}: relative error {error:.1e}"


# Losses and gradients


@pytest.mark.core
@pytest.mark.parametrize("trained_type", [Adapter, nnx.Param], ids=["adapters", "everything"])
def test_gradient_is_that_of_the_mean_over_all_supervised_tokens(directory, request, trained_type):
    model = request.getfixturevalue("model") if trained_type is Adapter else Model(directory, trained_type)
    step = request.getfixturevalue("sgd_step") if trained_type is Adapter else model.step(SGD)
    chosen = [example for seed in (0, 1) for example in examples(seed) if len(example[0]) == 9]
    loss, gradient = reference(model, chosen)
    state, metrics = step(model.state(SGD), model.frozen, alone(chosen, 4))
    assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-6)
    squares = sum(np.square(np.asarray(g, np.float64)).sum() for g in gradient.values())
    assert float(metrics.grad_norm) == pytest.approx(math.sqrt(squares), rel=1e-5)
    assert int(metrics.count) == sum(learned.sum() for _, learned in chosen) == 2 * (8 + 4 + 7 + 5)
    assert int(metrics.tokens) == 8 * 9
    assert int(metrics.skipped_in_a_row) == 0
    close({name: model.trained[name] - array for name, array in state.trained.items()}, gradient)
    assert min(np.linalg.norm(g) for g in gradient.values()) > 1e-4, "every parameter matters"


@pytest.mark.core
def test_accumulation_equals_one_large_batch(model, sgd_step):
    """Micro-batches with 11, 5, 9 and no supervised tokens."""
    chosen = examples()
    chosen[-2:] = map(unlearned, chosen[-2:])

    def updated(accumulation: int):
        state, found = model.state(SGD), []
        for _ in range(3):
            state, metrics = sgd_step(state, model.frozen, alone(chosen, accumulation))
            found.append([float(metrics.loss), float(metrics.grad_norm), int(metrics.count)])
        return state.trained, found

    (expected, whole), (found, parts) = updated(1), updated(4)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    close(found, expected)
    assert len({loss for loss, *_ in whole}) == 3, "something was learned in between"


def test_a_batch_without_a_supervised_token_changes_nothing(model, sgd_step):
    nothing = alone(list(map(unlearned, examples())))
    state, metrics = sgd_step(model.state(SGD), model.frozen, nothing)
    assert (float(metrics.loss), float(metrics.grad_norm), int(metrics.count)) == (0, 0, 0)
    chex.assert_trees_all_equal(jax.device_get(state.trained), jax.device_get(model.trained))


def evaluated(model: Model, batch: Batch, packed: bool = True) -> tuple[float, float]:
    """The sums of one batch."""
    step = make_eval_step(model.partition, Sft(), packed)
    found = step(model.trained, model.frozen, batch, Tally(jnp.zeros(1), jnp.zeros(1), {}), 0)
    return float(found.loss[0]), float(found.count[0])


def test_packed_examples_lose_token_by_token_what_they_lose_alone(model):
    chosen = examples(3)
    rows = without_axis(packed([chosen[:3], chosen[3:6], chosen[6:]]))
    single = jax.jit(lambda tokens: plain_losses(model.partition.join(model.trained, model.frozen), tokens))
    wanted = np.concatenate([single(ids)[learned[1:]] for ids, learned in chosen])

    step, found = make_eval_step(model.partition, Sft()), []
    for row, token in np.argwhere(rows.loss_mask):
        mask = np.zeros_like(rows.loss_mask)
        mask[row, token] = True
        sevens = Tally(jnp.full(3, 7.0), jnp.full(3, 7.0), {})
        tallies = step(model.trained, model.frozen, rows._replace(loss_mask=mask), sevens, 1)
        assert tallies.count.tolist() == [7, 1, 7]
        assert tallies.loss[::2].tolist() == [7, 7]
        found.append(float(tallies.loss[1]))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    total, count = evaluated(model, rows)
    assert total == pytest.approx(sum(wanted), rel=1e-6)
    assert count == len(wanted) == sum(supervised for _, supervised in EXAMPLES)


def test_one_example_to_a_row_needs_no_segments(model):
    """Padding on the right is out of sight; several examples to a row are another matter."""
    single, several = without_axis(alone(examples(3))), without_axis(packed([examples(3)[:3]]))
    for rows, same in ((single, True), (several, False)):
        losses = [evaluated(model, rows, packed)[0] for packed in (True, False)]
        assert (losses[0] == pytest.approx(losses[1], rel=1e-5)) == same


# Updates that are not finite


def counts(state: TrainState) -> list[int]:
    return [int(state.step), int(state.skipped), int(state.skipped_in_a_row)]


def learned_of(state: TrainState):
    return jax.device_get((state.trained, state.optimizer))


def planted(frozen: nnx.State, value: float) -> nnx.State:
    """The frozen arrays with one number of the largest replaced."""
    leaves, structure = jax.tree.flatten(frozen)
    largest = max(range(len(leaves)), key=lambda index: leaves[index].size)
    leaves[largest] = leaves[largest].at[(1,) * leaves[largest].ndim].set(value)
    return jax.tree.unflatten(structure, leaves)


@pytest.mark.core
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "inf"])
def test_an_update_that_is_not_finite_is_skipped_and_counted(model, adam, adam_step, value):
    rows, bad = alone(examples(), 2), planted(model.frozen, value)
    state, _ = adam_step(model.state(adam), model.frozen, rows)
    before, found = learned_of(state), []
    for _ in range(2):
        state, metrics = adam_step(state, bad, rows)
        assert int(metrics.skipped_in_a_row) > 0
        assert not math.isfinite(float(metrics.loss))
        found.append(counts(state))
    chex.assert_trees_all_equal(learned_of(state), before)
    state, metrics = adam_step(state, model.frozen, rows)
    assert [*found, counts(state)] == [[2, 1, 1], [3, 2, 2], [4, 2, 0]]
    assert int(metrics.skipped_in_a_row) == 0

    # As if the skipped ones had not been: neither the schedule nor Adam's own count went on.
    undisturbed = model.state(adam)
    for _ in range(2):
        undisturbed, _ = adam_step(undisturbed, model.frozen, rows)
    chex.assert_trees_all_equal(learned_of(state), learned_of(undisturbed))


def test_an_adapter_that_is_not_finite_stays_as_it_is(model, adam, adam_step):
    state = model.state(adam)
    name = next(name for name in state.trained if name.endswith("down_proj.adapter.A"))
    state.trained[name] = state.trained[name].at[1, 0, 0].set(np.inf)
    before = learned_of(state)
    for count in (1, 2, 3):
        state, metrics = adam_step(state, model.frozen, alone(examples(), 2))
        assert counts(state) == [count, count, count]
        assert int(metrics.skipped_in_a_row) > 0
    chex.assert_trees_all_equal(learned_of(state), before)


# Dropout


@pytest.fixture(scope="module")
def dropping_steps(dropping):
    """By seed, for batches of two micro-batches of four rows."""
    return {seed: dropping.step(optax.set_to_zero(), seed) for seed in (7, 8)}


@pytest.fixture
def losses(dropping, dropping_steps):
    """`losses(seed, batch)`: of three updates that change nothing."""

    def run(seed: int, rows: Batch) -> list[float]:
        state, found = dropping.state(optax.set_to_zero()), []
        for _ in range(3):
            state, metrics = dropping_steps[seed](state, dropping.frozen, rows)
            found.append(float(metrics.loss))
        return found

    return run


def test_dropout_depends_on_seed_and_step_alone(losses):
    rows = alone(examples(), 2)
    first = losses(7, rows)
    assert losses(7, rows) == first
    assert len({*first, *losses(8, rows)}) == 6


def test_dropout_is_another_in_every_micro_batch(losses):
    four = examples()[:4]
    both = losses(7, alone(four + four, 2))
    first = losses(7, alone(four + list(map(unlearned, four)), 2))
    assert all(abs(a - b) > 1e-4 for a, b in zip(both, first, strict=True))


def test_a_gradient_may_overflow_though_the_loss_is_finite(dropping, dropping_steps):
    """Where B is zero the loss does not depend on the scale; the gradient does, and its square overflows."""
    state = dropping.state(optax.set_to_zero())
    trained = {n: jnp.zeros_like(a) if n.endswith(".B") else a for n, a in state.trained.items()}
    scaled = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 1e25 if "scale" in jax.tree_util.keystr(path) else leaf, dropping.frozen
    )
    state, metrics = dropping_steps[7](state._replace(trained=trained), scaled, alone(examples(), 2))
    assert math.isfinite(float(metrics.loss))
    assert int(metrics.skipped_in_a_row) > 0
    assert counts(state) == [1, 1, 1]


def test_evaluation_drops_nothing(directory, dropping, losses):
    rows = alone(examples(), 2)
    found = [
        total / count
        for each in (dropping, Model(directory, target_modules=["q_proj"]))
        for total, count in [evaluated(each, without_axis(rows))]
    ]
    assert found[0] == found[1]
    assert all(abs(loss - found[0]) > 1e-5 for loss in losses(7, rows))


def test_every_linear_of_every_layer_draws_for_itself(directory, monkeypatch):
    keys, drop = [], lora._dropout

    def record(x, rate, key):
        jax.debug.callback(lambda data: keys.append(tuple(data.tolist())), jax.random.key_data(key))
        return drop(x, rate, key)

    monkeypatch.setattr(lora, "_dropout", record)
    whole = Model(directory, target_modules="all-linear", lora_dropout=0.4).whole
    jax.block_until_ready(jax.jit(lambda: whole.hidden(jnp.arange(5)[None], key=jax.random.key(0)))())
    jax.effects_barrier()
    assert len(keys) == LAYERS * 7
    assert len(set(keys)) == len(keys)


# Buffers and programs


def test_the_state_is_given_up_and_the_base_is_not(model, adam, adam_step):
    state = model.state(adam)
    after, _ = adam_step(state, model.frozen, alone(examples(), 2))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.trained, state.optimizer)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((model.frozen, after)))


def test_the_program_is_traced_once(model, adam, adam_step):
    state = model.state(adam)
    for seed in range(6):
        state, _ = adam_step(state, model.frozen, alone(examples(seed), 2))
    assert int(state.step) == 6


def test_only_adapters_have_gradients_and_moments(model, adam):
    state, expected = model.state(adam), {}
    for name, rows, columns in (("self_attn.q_proj", 16, 16), ("mlp.down_proj", 16, 24)):
        for part, shape in {"A": (3, columns), "B": (rows, 3), "magnitude": (rows,)}.items():
            expected[f"model.layers.0.0.{name}.adapter.{part}"] = (LAYERS, *shape)
    assert {name: array.shape for name, array in state.trained.items()} == expected
    moments = [path for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer) if leaf.ndim]
    assert sorted(path[-1].key for path in moments) == sorted([*expected, *expected])
    assert all(array.dtype == jnp.float32 for array in state.trained.values())


def test_taking_apart_and_joining_is_the_identity(directory, model):
    everything = Model(directory, nnx.Param)
    for each in (model, everything):
        again = each.partition.join(*each.partition.split(each.whole))
        chex.assert_trees_all_equal(nnx.state(again), nnx.state(each.whole))
    assert set(everything.partition.names) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        *(f"model.layers.0.0.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")),
        *(f"model.layers.0.0.self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"model.layers.0.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }
