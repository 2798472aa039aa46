"""Adapters beside their formulas and PEFT's own layers; what stays zero, and what a fresh one changes."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxft
from jaxft.adapters import lora
from jaxft.adapters.attach import attach, detach, factors_of
from jaxft.adapters.lora import LoRA, LoraSpec, row_squares
from jaxft.adapters.merge import merge
from jaxft.adapters.targets import LoraConfig
from jaxft.config import Config
from jaxft.data.batch import Batch
from jaxft.models.linear import Adapter, Linear
from jaxft.objectives.sft import Sft
from jaxft.quantization.formats import parse_format
from jaxft.quantization.qtensor import quantize
from jaxft.training.optimizer import make_optimizer
from jaxft.training.state import Partition
from jaxft.training.step import initial_state, make_train_step

pytestmark = pytest.mark.usefixtures("quick_compiles")

OUT, IN, RANK, ALPHA = 9, 64, 4, 6.0
MODEL = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def drawn(*shape: int, seed: int, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


W, A, B = drawn(OUT, IN, seed=0), drawn(RANK, IN, seed=1), drawn(OUT, RANK, seed=2)
MAGNITUDE = np.abs(drawn(OUT, seed=3)) + 0.5
X = drawn(5, IN, seed=4)


PARTS = {"A": A, "B": B, "magnitude": MAGNITUDE}


def adapted(weight=W, parts=PARTS, **settings) -> Linear:
    """A linear layer with the adapter above."""
    weight, parts = jax.tree.map(jnp.asarray, (weight, parts))
    linear, spec = Linear(weight), LoraSpec((RANK,), (ALPHA,), **settings)
    dora = (parts["magnitude"], row_squares(weight)) if spec.use_dora else ()
    linear.adapter = LoRA(spec, jnp.float32(spec.scales[0]), parts["A"], parts["B"], *dora)
    return linear


def formula(weight, x, dropped=None, *, use_rslora=False, use_dora=False) -> np.ndarray:
    """The adapted product in float64, the sum formed: PEFT's documented forward."""
    weight, x = np.asarray(weight, np.float64), x.astype(np.float64)
    dropped = x if dropped is None else dropped.astype(np.float64)
    update = ALPHA / (RANK**0.5 if use_rslora else RANK) * B.astype(np.float64) @ A
    y, change = x @ weight.T, dropped @ update.T
    if not use_dora:
        return y + change
    gain = MAGNITUDE / np.linalg.norm(weight + update, axis=1)
    return y + (gain - 1) * (dropped @ weight.T) + gain * change


class TestTraced(chex.TestCase):
    """The layer as it is and compiled."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_value_and_gradients(self):
        def apply(parts, x):
            return adapted(parts=parts, use_dora=True)(x)

        parts = {name: jnp.asarray(value) for name, value in PARTS.items()}
        y = self.variant(apply)(parts, jnp.asarray(X))
        np.testing.assert_allclose(y, formula(W, X, use_dora=True), rtol=1e-5, atol=1e-4)
        gradients = self.variant(jax.grad(lambda parts, x: jnp.sum(jnp.sin(apply(parts, x)))))(parts, jnp.asarray(X))
        step = 1e-3 * np.random.default_rng(5).choice([-1.0, 1.0], MAGNITUDE.shape).astype(np.float32)
        up, down = (
            np.sin(np.asarray(apply(parts | {"magnitude": MAGNITUDE + sign * step}, jnp.asarray(X)), np.float64)).sum()
            for sign in (1, -1)
        )
        assert (up - down) / 2 == pytest.approx(float(gradients["magnitude"] @ step), rel=1e-2, abs=1e-4)


def test_an_adapter_on_the_head_gives_unrounded_logits(random_checkpoint):
    """In bfloat16, too, logits are float32, as without an adapter."""
    base = jaxft.load_model(random_checkpoint(MODEL), "bfloat16")
    tokens = np.arange(8, dtype=np.int32)[None]
    model = attach(base, LoraConfig(r=2, lora_alpha=4, target_modules=["lm_head"]), jax.random.key(0))
    chex.assert_trees_all_close(model(tokens), base(tokens), rtol=1e-6)
    rounded = model(tokens).astype(jnp.bfloat16).astype(jnp.float32)
    assert (model(tokens) != rounded).mean() > 0.9


VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True},
}
each_variant = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)


@pytest.mark.core
@each_variant
def test_forward_is_the_formula(settings):
    np.testing.assert_allclose(adapted(**settings)(X), formula(W, X, **settings), rtol=1e-5, atol=1e-4)


@each_variant
def test_forward_on_a_quantized_base_is_the_formula_on_its_dequantized_weight(settings):
    weight = quantize(jnp.asarray(W), parse_format("nf4"))
    expected = formula(weight.dequantize(jnp.float32), X, **settings)
    np.testing.assert_allclose(adapted(weight, **settings)(X), expected, rtol=1e-5, atol=1e-4)
    assert np.abs(expected - formula(W, X, **settings)).max() > 0.1


@each_variant
@pytest.mark.parametrize("rate", [0.3, 0.9])
def test_dropout_is_drawn_once_for_the_adapters_input(settings, rate):
    key = jax.random.key(11)
    kept = np.asarray(jax.random.bernoulli(key, 1 - rate, X.shape))
    dropped = np.where(kept, X / np.float32(1 - rate), 0)
    found = adapted(dropout=rate, **settings)(X, key)
    np.testing.assert_allclose(found, formula(W, X, dropped, **settings), rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(adapted(dropout=rate, **settings)(X), adapted(**settings)(X))


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_dropout_keeps_the_mean_and_drops_at_its_rate(rate):
    count = 200_000
    found = np.asarray(lora._dropout(jnp.full(count, 3.0), rate, jax.random.key(0)))
    assert set(np.unique(found)) == {0, np.float32(3) / np.float32(1 - rate)}
    deviation = (rate * (1 - rate) / count) ** 0.5
    assert abs((found == 0).mean() - rate) < 5 * deviation
    assert found.mean() == pytest.approx(3, abs=5 * 3 * deviation / (1 - rate))


@pytest.mark.parity
@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["", "dropout"])
@each_variant
def test_values_and_gradients_are_those_of_peft(settings, dropout):
    """Dropout with the same mask on both sides; a bias, which no adapter touches."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    key, bias, weight = jax.random.key(5), drawn(OUT, seed=6), drawn(5, OUT, seed=7)
    kept = np.asarray(jax.random.bernoulli(key, 1 - dropout, X.shape))

    class SameMask(torch.nn.Module):
        def forward(self, x):
            return x * torch.tensor(kept) / (1 - dropout)

    base = torch.nn.Sequential(torch.nn.Linear(IN, OUT))
    base[0].weight.data, base[0].bias.data = torch.tensor(W), torch.tensor(bias)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], lora_dropout=dropout, **settings)
    theirs = peft.get_peft_model(base, config).train()
    layer = theirs.base_model.model[0]
    if dropout:
        layer.lora_dropout["default"] = SameMask()
    parts = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    if settings.get("use_dora"):
        parts["magnitude"] = layer.lora_magnitude_vector["default"].weight
    for name, part in parts.items():
        part.data = torch.tensor(PARTS[name])
    x = torch.tensor(X, requires_grad=True)
    expected = theirs(x)
    (expected * torch.tensor(weight)).sum().backward()

    def weighted(x, parts):
        linear = adapted(W, parts, dropout=dropout, **settings)
        linear.bias = nnx.Param(jnp.asarray(bias))
        y = linear(x, key)
        return jnp.sum(y * weight), y

    (_, found), (dx, gradients) = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)(X, PARTS)
    close = {"rtol": 1e-4, "atol": 1e-3}
    np.testing.assert_allclose(found, expected.detach().numpy(), **close)
    np.testing.assert_allclose(dx, x.grad.numpy(), **close)
    for name, part in parts.items():
        np.testing.assert_allclose(gradients[name], part.grad.numpy(), **close, err_msg=name)


# On a model


@pytest.fixture(scope="module")
def base(random_checkpoint):
    return jaxft.load_model(random_checkpoint(MODEL))


TOKENS = np.random.default_rng(0).integers(0, 31, (2, 9), dtype=np.int32)
#: Ranks that differ between the layers of a stack, and layers without an adapter.
UNEVEN = {
    "r": 3,
    "lora_alpha": 6,
    "target_modules": r".*\.(0|2)\.self_attn\.[qv]_proj|.*\.1\.mlp\.down_proj|.*\.2\.mlp\.(up|down)_proj",
    "rank_pattern": {r"layers\.2\.self_attn\.q_proj": 5, r"layers\.1\.mlp\.down_proj": 1},
}


@pytest.mark.core
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}, UNEVEN])
def test_a_fresh_adapter_changes_nothing(base, settings):
    """Not a bit; with DoRA a row is divided by its length and multiplied by it, which rounds."""
    config = LoraConfig(**{"r": 3, "lora_alpha": 6} | settings)
    model = attach(base, config, jax.random.key(0))
    expected = np.asarray(base(TOKENS))
    np.testing.assert_allclose(model(TOKENS), expected, rtol=0, atol=1e-5 if config.use_dora else 0)
    np.testing.assert_array_equal(detach(model)(TOKENS), expected)
    assert not factors_of(base), "the model given is left as it was"


def test_a_fresh_adapter_is_drawn_as_in_peft(base):
    """A is uniform in ±1/√in, another for every module and seed; B is zero."""
    config = LoraConfig(r=8, lora_alpha=16)
    first, other = (factors_of(attach(base, config, jax.random.key(seed))) for seed in (0, 1))
    drawn = [part.A.ravel() * part.A.shape[1] ** 0.5 for part in first.values()]
    values = np.concatenate(drawn)
    assert np.abs(values).max() <= 1
    assert values.std() == pytest.approx(1 / 3**0.5, rel=0.02)
    assert abs(values.mean()) < 0.05
    assert len({array.tobytes() for array in drawn}) == len(first) == 7 * 3
    assert not any(np.any(part.B) for part in first.values())
    assert all(np.any(first[name].A != other[name].A) for name in first)
    again = factors_of(attach(base, config, jax.random.key(0)))
    chex.assert_trees_all_equal(again, first)


def test_a_second_adapter_is_refused(base):
    config = LoraConfig(r=2, lora_alpha=4)
    with pytest.raises(ValueError, match="carries an adapter already; merge it first"):
        attach(attach(base, config, jax.random.key(0)), config, jax.random.key(1))


def batch(steps: int) -> Batch:
    random = np.random.default_rng(1)
    shape = (steps, 2, 2, 12)
    tokens = random.integers(0, 31, shape, dtype=np.int32)
    ones = np.ones(shape, np.int32)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), shape)
    return Batch(tokens, random.random(shape) < 0.6, ones, positions)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_padding_stays_zero_and_absent_adapters_absent(base, use_dora):
    """Ten updates of AdamW with weight decay, on stacks whose layers have ranks 0 to 5."""
    config = LoraConfig(**UNEVEN, use_dora=use_dora)
    model = attach(base, config, jax.random.key(0))
    before, partition = factors_of(model), Partition(model, Adapter)
    trained, frozen = partition.split(model)
    settings = Config(model_name_or_path="m", output_dir="o", datasets=["d"], learning_rate=0.01, weight_decay=0.3)
    optimizer = make_optimizer(settings, 10, partition.names)
    state, batches = initial_state(jax.tree.map(jnp.copy, trained), optimizer), batch(10)
    step = make_train_step(partition, Sft(), optimizer, state)
    for index in range(10):
        state, metrics = step(state, frozen, Batch(*(field[index] for field in batches)))
        assert int(metrics.skipped_in_a_row) == 0

    ranks = {"q_proj": (3, 0, 5), "v_proj": (3, 0, 3), "up_proj": (0, 0, 3), "down_proj": (0, 1, 3)}
    for name, by_layer in ranks.items():
        (prefix,) = {key[:-1] for key in state.trained if f".{name}.adapter.A" in key}
        found = {part: np.asarray(state.trained[f"{prefix}{part}"]) for part in "AB"}
        for layer, rank in enumerate(by_layer):
            assert not found["A"][layer, rank:].any()
            assert not found["B"][layer, :, rank:].any()
            assert np.all(found["A"][layer, :rank])
            assert np.all(found["B"][layer, :, :rank])

    tuned = partition.join(state.trained, frozen)
    after = factors_of(tuned)
    assert after.keys() == before.keys()
    assert {name: len(part.A) for name, part in after.items()} == {
        f"model.layers.{layer}.{block}.{name}": rank
        for name, by_layer in ranks.items()
        for layer, rank in enumerate(by_layer)
        for block in [{"q": "self_attn", "v": "self_attn"}.get(name[0], "mlp")]
        if rank
    }
    for name in after:
        for now, then in zip(after[name], before[name], strict=True):
            assert now is None or np.abs(now - then).max() > 1e-3
    # The model is the one that its unpadded factors describe.
    np.testing.assert_allclose(tuned(TOKENS), merge(tuned)(TOKENS), rtol=1e-4, atol=1e-4)


def test_layers_without_an_adapter_compute_what_the_base_computes(base):
    """With DoRA, too: their magnitudes, which are there for the sake of the stack, decide nothing."""
    model = attach(
        base, LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=r".*\.1\..*up_proj"), jax.random.key(0)
    )
    site = model.model.layers[0][0].mlp.up_proj.adapter
    expected = np.asarray(model(TOKENS))
    changed = site.magnitude.get_value().at[jnp.array([0, 2])].mul(5.0)
    site.magnitude.set_value(changed)
    np.testing.assert_array_equal(model(TOKENS), expected)
    site.magnitude.set_value(changed.at[1].mul(5.0))
    assert np.abs(np.asarray(model(TOKENS)) - expected).max() > 0.01


def test_only_the_adapter_has_gradients(base):
    model = attach(base, LoraConfig(r=2, lora_alpha=4), jax.random.key(0))
    partition = Partition(model, Adapter)
    trained, frozen = partition.split(model)
    assert all(name.endswith((".adapter.A", ".adapter.B")) for name in trained)
    assert len(trained) == 2 * 7
    assert optax.tree.size(trained) == 3 * 2 * (2 * (16 + 16) + 2 * (8 + 16) + 3 * (24 + 16))
    assert optax.tree.size(frozen) == optax.tree.size(nnx.state(base)) + 7 * 3, "the base and the scales"


@pytest.mark.parametrize("form", [None, "nf4", "int8"])
def test_row_squares_of_a_stack_are_those_of_each(form):
    stack = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 128)), jnp.float32)
    weight = stack if form is None else quantize(stack, parse_format(form))
    dense = stack if form is None else weight.dequantize(jnp.float32)
    np.testing.assert_allclose(row_squares(weight), np.sum(np.square(dense), axis=-1), rtol=1e-6)


LAYERS = "model.layers.*.input_layernorm, model.layers.*.post_attention_layernorm"


@pytest.mark.parametrize(
    "targets, others",
    [
        (r"lm_head|.*\.q_proj", ""),
        (r"(.*\.)?lm_\w+|.*v_proj", ""),
        (r"(lm_head|.*(input_layernorm|k_proj))", "model.layers.*.input_layernorm"),
        (r"(model\.embed_tokens|lm_head|.*o_proj)", "model.embed_tokens"),
        (r".*", f"model.embed_tokens, {LAYERS}, model.norm"),
    ],
)
def test_an_expression_that_matches_what_gets_no_adapter_is_refused(random_checkpoint, targets, others):
    """An embedding, norms, and a head that is the embedding. The advice in the message works, and so does an exception;
    a head of its own gets its adapter."""
    llama = {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    }
    tied, untied = (jaxft.load_model(random_checkpoint(llama | {"tie_word_embeddings": tie})) for tie in (True, False))
    key = jax.random.key(0)
    found = f"{others}{', ' * bool(others)}lm_head"
    with pytest.raises(ValueError, match=re.escape(f"adapter: {found} (lm_head is the embedding")) as error:
        attach(tied, LoraConfig(2, 4, targets), key)
    without = factors_of(attach(tied, LoraConfig(2, 4, advised(error)), key)).keys()
    exceptions = [name.rpartition(".")[2] for name in found.split(", ")]
    assert without == factors_of(attach(tied, LoraConfig(2, 4, targets, exclude_modules=exceptions), key)).keys()
    if others:
        with pytest.raises(ValueError, match=re.escape(f"adapter: {others}; leave it out")) as error:
            attach(untied, LoraConfig(2, 4, targets), key)
        targets = advised(error)
    assert factors_of(attach(untied, LoraConfig(2, 4, targets), key)).keys() == without | {"lm_head"}


def advised(error: pytest.ExceptionInfo) -> str:
    return str(error.value).rpartition("expression: ")[2]
