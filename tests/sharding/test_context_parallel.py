"""Tokens of a row cut over devices: loss, gradients and texts of one device, and what moves between them."""

import re

import jax
import numpy as np
import pytest

import jaxft
from jaxft.adapters.attach import attach
from jaxft.adapters.targets import LoraConfig
from jaxft.data.batch import Batch
from jaxft.generation.generate import generate
from jaxft.models.hf_config import decoder_config
from jaxft.models.linear import Adapter
from jaxft.models.placement import check_mesh
from jaxft.objectives.sft import Sft
from jaxft.sharding.mesh import batch_sharding, make_mesh
from jaxft.training.state import Partition
from jaxft.training.step import tally

SIZES = dict(
    vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=False,
)  # fmt: skip
MODELS = {
    "mistral": SIZES | dict(sliding_window=9),
    "gpt_oss": SIZES | dict(sliding_window=7, num_local_experts=4, num_experts_per_tok=2),  # sinks, experts, windows
}
TARGETS = dict(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


@pytest.fixture(scope="module")
def directories(random_checkpoint):
    return {name: random_checkpoint(dict(model_type=name) | sizes) for name, sizes in MODELS.items()}


def packed_batch(rows: int = 4, length: int = 32) -> Batch:
    """Three examples to a row, of lengths that no cut of the row falls between, and padding in half of the rows."""
    rng = np.random.default_rng(0)
    segments = np.tile(np.repeat([1, 2, 3], (13, 5, length - 18)), (rows, 1)).astype(np.int32)
    segments[rows // 2 :, -6:] = 0
    positions = np.tile(np.concatenate([np.arange(n) for n in (13, 5, length - 18)]), (rows, 1)).astype(np.int32)
    tokens = rng.integers(0, 96, (rows, length), dtype=np.int32)
    return Batch(tokens, rng.random((rows, length)) < 0.7, segments, positions)


def prepared(directory, mesh):
    """A jitted function of loss and gradients, and its arguments, for a model whose adapters are not zero."""
    experts = {"target_parameters": ("mlp.experts.down_proj",)} if "gpt" in directory.name else {}
    model = attach(jaxft.load_model(directory, mesh=mesh), LoraConfig(**TARGETS, **experts), jax.random.key(1))
    partition = Partition(model, Adapter)
    trained, frozen = partition.split(model)
    trained = {name: value + 0.02 if name.endswith(".B") else value for name, value in trained.items()}
    batch = packed_batch() if mesh is None else jax.device_put(packed_batch(), batch_sharding(mesh))

    @jax.jit
    def run(trained, frozen, batch):
        def loss(trained):
            return tally(partition.join(trained, frozen), Adapter, Sft(), batch, None)[:2]

        return jax.value_and_grad(loss, has_aux=True)(trained)

    return run, (trained, frozen, batch)


@pytest.fixture(scope="module")
def one_device_gives(directories):
    def run(name):
        step, arguments = prepared(directories[name], None)
        return jax.device_get(step(*arguments))

    return {name: run(name) for name in MODELS}


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("mistral", dict(context=8)),
        ("mistral", dict(context=2, fsdp=2, tensor=2)),
        ("gpt_oss", dict(context=2, fsdp=2, tensor=2)),
        ("gpt_oss", dict(context=2, expert=4)),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_one_device(directories, one_device_gives, name, mesh):
    step, arguments = prepared(directories[name], make_mesh(mesh))
    (total, count), gradient = jax.device_get(step(*arguments))
    (expected_total, expected_count), expected = one_device_gives[name]
    assert count == expected_count
    assert total == pytest.approx(expected_total, rel=2e-6)
    for key, value in gradient.items():
        error = np.linalg.norm(value - expected[key]) / np.linalg.norm(expected[key])
        assert error < 2e-5, f"{key}: relative error {error:.1e}"


def test_what_moves_over_context(directories):
    """Queries, keys, values and outputs by all-to-all, gradients of adapters by all-reduce; no float is gathered."""
    step, arguments = prepared(directories["mistral"], make_mesh(dict(context=4, data=2)))
    text = step.lower(*arguments).compile().as_text()
    moved = set(re.findall(r"= \(?(\w+\[[\d,]*\]).* (all-gather|all-to-all|collective-permute|all-reduce)\(", text))
    of_heads = {("f32[2,8,2,16]", "all-to-all"), ("f32[2,8,1,16]", "all-to-all")}
    assert of_heads < moved
    assert any(shape.endswith(",128]") and name == "all-reduce" for shape, name in moved)
    assert not [one for one in moved if one[0].startswith("f32") and one[1] in ("all-gather", "collective-permute")]


def test_texts_of_one_device(directories):
    """Prompts and caches whose lengths the mesh divides, single tokens that it does not, a cache cut by its heads."""
    prompts = [[5, 8, 13], [4] * 70, [9, 1]]
    options = dict(max_new_tokens=6, eos_ids=[])
    expected = generate(jaxft.load_model(directories["gpt_oss"]), prompts, **options)
    for sizes in (dict(context=2, data=2, tensor=2), dict(context=2, expert=4)):
        model = jaxft.load_model(directories["gpt_oss"], mesh=make_mesh(sizes))
        assert generate(model, prompts, **options) == expected


def test_lengths_that_do_not_divide(directories):
    tokens = np.random.default_rng(0).integers(0, 96, (3, 11), dtype=np.int32)
    expected = jaxft.load_model(directories["gpt_oss"])(tokens)
    model = jaxft.load_model(directories["gpt_oss"], mesh=make_mesh(dict(context=4, expert=2)))
    np.testing.assert_allclose(jax.jit(lambda m, t: m(t))(model, tokens), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("heads", "sizes", "message"),
    [
        (12, dict(context=4, tensor=2), "context=4 x tensor=2 .* has 12; .* context may be 1 or 2 or 3 or 6"),
        (6, dict(context=2, tensor=4), "context=2 x tensor=4 .* has 6; .* choose a tensor that divides 6"),
    ],
)
def test_heads_that_cannot_be_shared_out(heads, sizes, message):
    config = decoder_config(SIZES | dict(model_type="llama", hidden_size=96, num_attention_heads=heads))
    with pytest.raises(ValueError, match=message):
        check_mesh(config, make_mesh(sizes))
