"""The cached, batched, padded loop against the plain one: whole sequences, one row, no cache."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.special import softmax
from scipy.stats import chisquare

import jaxft
from jaxft.adapters.attach import attach, sites
from jaxft.adapters.targets import LoraConfig
from jaxft.generation import generate as module
from jaxft.generation.generate import generate
from jaxft.models.decoder import Decoder, modules, parameters
from jaxft.models.placement import bind
from jaxft.sharding.layout import layout_of
from jaxft.sharding.mesh import make_mesh

VOCAB = 97
SMALL = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
KINDS = {
    "grouped": {},
    "one key-value head, tied, biased": {
        "model_type": "qwen2",
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "window": {"model_type": "mistral", "sliding_window": 7},
    "alternating windows": {
        "model_type": "qwen3",
        "num_hidden_layers": 5,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    },
}
NEW = 12
NEVER = [VOCAB, VOCAB + 1]
"""Ids that no text ends with, as many as the tests use otherwise."""


@pytest.fixture(scope="module")
def tiny(random_checkpoint):
    """`tiny(**changes)`: a random model that attends sharply, so that its texts do not run in circles."""
    paths = {}

    def load(seed: int = 0, dtype: str = "float32", quantization: str | None = None, **changes):
        path = paths.setdefault((seed, str(changes)), None) or random_checkpoint(SMALL | changes, seed)
        paths[seed, str(changes)] = path
        model = jaxft.load_model(path, dtype, quantization)
        model.source = None  # models of one shape then share what is compiled
        for name, _, norm in modules(model):
            if name.endswith("input_layernorm"):
                norm.weight.set_value(4 * norm.weight.get_value())
        return model

    return load


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


@jax.jit
def whole_sequence(model, tokens):
    return model(tokens)


def logits_of(model, tokens: list[int], width: int = 96) -> np.ndarray:
    """[n, V] for n tokens; what is behind them cannot reach them."""
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(whole_sequence(model, padded))[0, : len(tokens)]


def plain(model, prompt: list[int], count: int, width: int = 96) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_of(model, tokens, width)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_loop_without_cache(tiny, kind):
    model, asked = tiny(**KINDS[kind]), prompts(5, 23, 70, 64, 1)
    expected = [plain(model, prompt, NEW) for prompt in asked]
    assert len({token for row in expected for token in row}) > NEW, "the model should say different things"
    assert generate(model, asked, max_new_tokens=NEW, eos_ids=NEVER) == expected


def test_a_row_does_not_depend_on_its_batch(tiny):
    model, asked = tiny(), prompts(5, 23, 64)
    options = {"max_new_tokens": NEW, "eos_ids": [3, 4], "temperature": 1.5, "top_p": 0.9, "seed": 5}
    together = generate(model, asked, **options)
    assert together == [generate(model, [prompt], **options)[0] for prompt in asked]
    assert together == generate(model, asked[::-1], **options)[::-1]
    assert together != generate(model, asked, **options | {"seed": 6})


@pytest.mark.parametrize(
    "dtype, quantization, use_dora, tolerance",
    [("float32", "nf4", True, 1e-4), ("bfloat16", "int8", False, 0.15)],
)
def test_adapters_and_few_bits(tiny, dtype, quantization, use_dora, tolerance):
    """Rounding may decide between near equals, so each token is judged by the logits that it had to lead."""
    model = tiny(dtype=dtype, quantization=quantization)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_dora=use_dora)
    model = attach(model, config, jax.random.key(0))
    bare = generate(model, prompts(5, 23, 11), max_new_tokens=NEW, eos_ids=NEVER)
    for index, site in enumerate(sites(model)):
        if (lora := site.linear.adapter) is not None:
            lora.B.set_value(0.3 * jax.random.normal(jax.random.key(index), lora.B.get_value().shape))
    texts = generate(model, prompts(5, 23, 11), max_new_tokens=NEW, eos_ids=NEVER)
    assert texts != bare
    for prompt, text in zip(prompts(5, 23, 11), texts, strict=True):
        assert len(text) == NEW
        logits = logits_of(model, prompt + text)[len(prompt) - 1 : -1]
        lead = logits.max(axis=1) - np.take_along_axis(logits, np.array(text)[:, None], axis=1)[:, 0]
        assert lead.max() <= tolerance
        assert (logits.max(axis=1) - np.median(logits, axis=1)).min() > 5 * tolerance


def place(model: Decoder, mesh: Mesh) -> None:
    """Move a model onto a mesh and bind it."""
    bind(model, mesh)
    for parameter, variable in parameters(model):
        layout = layout_of(parameter.name, parameter.shape, mesh)
        spec = layout.stored if parameter.layers is None else P(None, *layout.stored)
        variable.set_value(jax.device_put(variable.get_value(), NamedSharding(mesh, spec)))


@pytest.mark.parametrize(
    "axes", [{"data": 2, "fsdp": 2, "tensor": 2}, pytest.param({"tensor": 8}, marks=pytest.mark.slow)]
)
def test_a_mesh_changes_nothing(tiny, axes):
    """Three rows do not divide over four devices, and eight devices do not divide two key-value heads."""
    asked, model = prompts(5, 23, 11), tiny()
    expected = generate(model, asked, max_new_tokens=NEW, eos_ids=NEVER)
    place(model, make_mesh(axes))
    assert generate(model, asked, max_new_tokens=NEW, eos_ids=NEVER) == expected


def test_texts_are_as_frequent_as_the_model_says(tiny):
    """Two tokens after each of 1000 copies of a prompt."""
    model, prompt = tiny(vocab_size=4), [1, 3, 0]
    options = {"max_new_tokens": 2, "eos_ids": [], "temperature": 2.0}
    texts = generate(model, [prompt] * 1000, **options)
    counts = np.zeros((4, 4))
    np.add.at(counts, tuple(np.array(texts).T), 1)
    expected = np.zeros((4, 4))
    for first in range(4):
        before, after = softmax(logits_of(model, [*prompt, first])[-2:].astype(np.float64) / 2, axis=-1)
        expected[first] = 1000 * before[first] * after
    assert chisquare(counts.ravel(), expected.ravel()).pvalue > 1e-3
    assert chisquare(counts.ravel(), expected.T.ravel()).pvalue < 1e-3, "the test can fail"
    assert texts == generate(model, [prompt] * 1000, **options)


def test_ends_at_any_eos_and_leaves_it_out(tiny):
    model, asked = tiny(), prompts(5, 23, 11)
    whole = generate(model, asked, max_new_tokens=NEW, eos_ids=NEVER)
    stops = {whole[0][4], whole[1][0]}
    found = generate(model, asked, max_new_tokens=NEW, eos_ids=stops)
    for row, text in enumerate(whole):
        ends = [index for index, token in enumerate(text) if token in stops]
        assert found[row] == text[: ends[0] if ends else None]
    assert found[1] == []


def test_the_loop_ends_with_the_last_row(tiny, monkeypatch):
    model, asked, steps = tiny(), prompts(5, 23, 11), []
    whole = generate(model, asked, max_new_tokens=NEW, eos_ids=NEVER)
    choose = module.choose

    def counted(logits, step, sampling):
        jax.debug.callback(lambda value: steps.append(int(value)), step)
        return choose(logits, step, sampling)

    monkeypatch.setattr(module, "choose", counted)
    monkeypatch.setattr(module, "_complete", jax.jit(module._complete.__wrapped__, static_argnames="slots"))
    found = generate(model, asked, max_new_tokens=NEW, eos_ids=[text[3] for text in whole])
    jax.effects_barrier()
    assert sorted(steps) == list(range(max(map(len, found)) + 1))
    assert len(steps) <= 4


def test_few_shapes_are_compiled(tiny, monkeypatch):
    traced = chex.assert_max_traces(module._complete.__wrapped__, 2)
    monkeypatch.setattr(module, "_complete", jax.jit(traced, static_argnames="slots"))
    model, other = tiny(), tiny(seed=1)
    first = generate(model, prompts(3, 9), max_new_tokens=20, eos_ids=[1, 2])
    generate(model, prompts(64, 1), max_new_tokens=65, eos_ids=[3, 4])
    assert first != generate(other, prompts(3, 9), max_new_tokens=20, eos_ids=[1, 2]), "weights are arguments"
    for temperature in (0.5, 1.3):
        generate(model, prompts(7, 7), max_new_tokens=9, eos_ids=[5, 6], temperature=temperature)
    with pytest.raises(AssertionError, match="traced"):
        generate(model, prompts(65, 9), max_new_tokens=20, eos_ids=[1, 2])


def test_a_text_ends_where_the_positions_do(tiny, caplog):
    model, asked = tiny(max_position_embeddings=40), prompts(33, 12)
    found = generate(model, asked, max_new_tokens=NEW, eos_ids=NEVER)
    assert re.fullmatch(r"prompts \[0\].*40 positions are full", caplog.messages[0])
    assert found == [plain(model, asked[0], 7), plain(model, asked[1], NEW)]
    with pytest.raises(ValueError, match=r"prompts\[1\] has 40 tokens and the model 40 positions"):
        generate(model, prompts(3, 40), max_new_tokens=1, eos_ids=[])


def test_dynamic_rope_goes_beyond_its_positions(tiny, caplog):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = tiny(max_position_embeddings=16, rope_parameters=rope)
    (text,) = generate(model, prompts(12), max_new_tokens=NEW, eos_ids=NEVER)
    assert "positions" not in caplog.text
    assert len(text) == NEW
    assert text[:4] == plain(model, prompts(12)[0], 4, width=16)


def test_nothing_to_do(tiny):
    assert generate(tiny(), [], max_new_tokens=3, eos_ids=[]) == []


@pytest.mark.parametrize(
    "asked, options, message",
    [
        ([[1], []], {}, r"prompts\[1\] holds no token ids"),
        ([1, 2], {}, r"prompts\[0\] holds no token ids"),
        ([[1, VOCAB]], {}, r"prompts\[0\] holds ids outside the model's vocabulary, 0 to 96"),
        ([[-1]], {}, "vocabulary"),
        ([[0.5]], {}, "vocabulary"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"temperature": -0.1}, "temperature is -0.1"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"temperature": 1.0, "top_p": 1.1}, "top_p is 1.1"),
    ],
)
def test_refuses(tiny, asked, options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny(), asked, **{"max_new_tokens": 2, "eos_ids": []} | options)


def test_logits_that_are_not_finite_are_an_error(tiny):
    model, asked = tiny(), prompts(5, 23, 11)
    whole = generate(model, asked, max_new_tokens=NEW, eos_ids=NEVER)
    place_of = {
        token: (row, index) for row, text in enumerate(whole) for index, token in reversed(list(enumerate(text)))
    }
    seen = [set(text) for text in (*asked, *whole)]
    bad = next(token for token in place_of if sum(token in tokens for tokens in seen) == 1)
    row, index = place_of[bad]
    embedding = model.model.embed_tokens.weight
    embedding.set_value(embedding.get_value().at[bad].set(jnp.nan))
    with pytest.raises(ValueError, match=rf"prompts\[{row}\]: .* not finite after {index + 1} new tokens"):
        generate(model, asked, max_new_tokens=NEW, eos_ids=NEVER)
    whole[row] = whole[row][:index]
    assert generate(model, asked, max_new_tokens=NEW, eos_ids=[bad, VOCAB]) == whole
