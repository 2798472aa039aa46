"""The cached, batched, padded loop against the plain one: whole sequences, one row, no cache."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxft
from jaxft.adapters.attach import attach, sites
from jaxft.adapters.targets import LoraConfig
from jaxft.generation import generate as module
from jaxft.generation.generate import generate
from jaxft.models.placement import place
from jaxft.sharding.mesh import make_mesh

VOCAB, POSITIONS = 97, 256
SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=POSITIONS,
    tie_word_embeddings=False,
)
ALTERNATING = dict(
    model_type="qwen3",
    num_hidden_layers=5,
    use_sliding_window=True,
    sliding_window=5,
    layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
)
KINDS = {
    "grouped": dict(model_type="llama"),
    "one key-value head, tied, biased": dict(
        model_type="qwen2", num_key_value_heads=1, tie_word_embeddings=True
    ),
    "window": dict(model_type="mistral", sliding_window=7),
    "alternating windows": ALTERNATING,
}
LENGTHS = (5, 23, 70, 64, 1)
NEW = 12


@pytest.fixture(scope="module")
def tiny(random_checkpoint):
    """`tiny(**changes)`: a random model, sharp enough that its most likely tokens are far from a tie."""

    def load(seed: int = 0, dtype: str = "float32", quantization: str | None = None, **changes):
        path = random_checkpoint(SMALL | dict(model_type="llama") | changes, seed)
        model = jaxft.load_model(path, dtype, quantization)
        head = model.head.weight
        head.set_value((4 * head.get_value().astype(jnp.float32)).astype(head.get_value().dtype))
        return model

    return load


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


@jax.jit
def whole_sequence(model, tokens):
    return model(tokens)


def logits_of(model, tokens: list[int], width: int = 128) -> np.ndarray:
    """[n, V] for n tokens; what is behind them cannot reach them."""
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(whole_sequence(model, padded))[0, : len(tokens)]


def greedy(model, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_of(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_loop_without_cache(tiny, kind):
    model, asked = tiny(**KINDS[kind]), prompts(*LENGTHS)
    expected = [greedy(model, prompt, NEW) for prompt in asked]
    assert len({token for row in expected for token in row}) > NEW, "the model should say different things"
    assert generate(model, asked, max_new_tokens=NEW, eos_ids=[]) == expected


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 1.0), (1.5, 0.8)])
def test_a_row_does_not_depend_on_its_batch(tiny, temperature, top_p):
    model, asked = tiny(), prompts(*LENGTHS)
    options = dict(max_new_tokens=NEW, eos_ids=[3], temperature=temperature, top_p=top_p, seed=5)
    together = generate(model, asked, **options)
    assert together == [generate(model, [prompt], **options)[0] for prompt in asked]
    assert together == generate(model, asked[::-1], **options)[::-1]


def test_adapters_take_part(tiny):
    for use_dora in (False, True):
        model = attach(tiny(), LoraConfig(r=3, lora_alpha=6, use_dora=use_dora), jax.random.key(0))
        for index, site in enumerate(sites(model)):
            if (lora := site.linear.adapter) is not None:
                noise = jax.random.normal(jax.random.key(index), lora.B.get_value().shape)
                lora.B.set_value(0.3 * noise)
        asked = prompts(9, 3)
        found = generate(model, asked, max_new_tokens=NEW, eos_ids=[])
        assert found == [greedy(model, prompt, NEW) for prompt in asked]
        assert found != generate(tiny(), asked, max_new_tokens=NEW, eos_ids=[])


@pytest.mark.parametrize("dtype, quantization", [("float32", "nf4"), ("bfloat16", "int8"), ("bfloat16", None)])
def test_every_token_is_the_most_likely_in_few_bits(tiny, dtype, quantization):
    """Rounding may decide between near equals, so each token is judged by the logits before it."""
    model, asked = tiny(dtype=dtype, quantization=quantization), prompts(9, 30)
    tolerance = 1e-4 if dtype == "float32" else 0.2
    for prompt, new in zip(asked, generate(model, asked, max_new_tokens=NEW, eos_ids=[]), strict=True):
        assert len(new) == NEW
        logits = logits_of(model, prompt + new)[len(prompt) - 1 : -1]
        behind = logits.max(axis=1) - np.take_along_axis(logits, np.array(new)[:, None], 1)[:, 0]
        assert behind.max() <= tolerance
        assert np.median(logits.max(axis=1) - np.median(logits, axis=1)) > 5 * tolerance


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}, {"tensor": 8}])
def test_a_mesh_changes_nothing(tiny, axes):
    """Three rows do not divide over four devices, and eight devices do not divide two key-value heads."""
    asked = prompts(9, 30, 2)
    expected = generate(tiny(), asked, max_new_tokens=NEW, eos_ids=[8], temperature=0.7, seed=1)
    model = tiny()
    place(model, make_mesh(axes))
    assert generate(model, asked, max_new_tokens=NEW, eos_ids=[8], temperature=0.7, seed=1) == expected


def test_frequencies_of_whole_texts(tiny):
    """Two tokens of 3000 copies of a prompt are distributed as the model says."""
    from scipy.special import softmax
    from scipy.stats import chisquare

    model, (prompt,) = tiny(vocab_size=4), [[1, 3, 0]]
    logits = [logits_of(model, [*prompt, token])[-2:] for token in range(4)]
    temperature = np.abs(logits[0][0]).max() / 2
    p = np.array([softmax(pair[0] / temperature)[t] * softmax(pair[1] / temperature) for t, pair in enumerate(logits)])
    options = dict(max_new_tokens=2, eos_ids=[], temperature=float(temperature))
    texts = generate(model, [prompt] * 3000, **options)
    counts = np.zeros((4, 4))
    np.add.at(counts, tuple(np.array(texts).T), 1)
    assert chisquare(counts.ravel(), 3000 * p.ravel()).pvalue > 1e-3
    assert texts[:20] == generate(model, [prompt] * 20, **options)
    assert texts[:20] != generate(model, [prompt] * 20, **options, seed=1)


def test_ends_at_any_eos_and_leaves_it_out(tiny):
    model, asked = tiny(), prompts(5, 23, 11)
    whole = generate(model, asked, max_new_tokens=NEW, eos_ids=[])
    stops = {whole[0][4], whole[1][0]}
    found = generate(model, asked, max_new_tokens=NEW, eos_ids=stops)
    for row, text in enumerate(whole):
        ends = [index for index, token in enumerate(text) if token in stops]
        assert found[row] == text[: ends[0] if ends else None]
    assert found[1] == []


def test_the_loop_ends_with_the_last_row(tiny, monkeypatch):
    model, asked = tiny(), prompts(4, 6, 8)
    whole = generate(model, asked, max_new_tokens=40, eos_ids=[])
    steps = []

    def counted(logits, step, sampling):
        jax.debug.callback(lambda value: steps.append(int(value)), step)
        return choose(logits, step, sampling)

    choose = module.choose
    monkeypatch.setattr(module, "choose", counted)
    monkeypatch.setattr(module, "_complete", jax.jit(module._complete.__wrapped__, static_argnames="slots"))
    stops = {text[3] for text in whole}
    found = generate(model, asked, max_new_tokens=40, eos_ids=stops)
    jax.effects_barrier()
    assert steps == list(range(max(map(len, found)) + 1))
    assert len(steps) <= 4


def test_few_shapes_are_compiled(tiny, monkeypatch):
    def count_traces(most: int):
        traced = chex.assert_max_traces(module._complete.__wrapped__, most)
        monkeypatch.setattr(module, "_complete", jax.jit(traced, static_argnames="slots"))

    original = module._complete
    model, other = tiny(), tiny(seed=1)
    count_traces(2)
    texts = [
        generate(m, prompts(a, b, seed=seed), max_new_tokens=new, eos_ids=[1, stop])
        for m, a, b, new, seed, stop in [
            (model, 3, 9, 20, 1, 2),
            (model, 64, 1, 64, 2, 3),
            (other, 3, 9, 20, 1, 2),
        ]
    ]
    assert texts[0] != texts[2], "weights are arguments, not constants"
    for temperature in (0.5, 1.3):
        generate(model, prompts(7, 7), max_new_tokens=9, eos_ids=[5, 6], temperature=temperature, seed=4)
    monkeypatch.setattr(module, "_complete", original)
    count_traces(1)
    generate(model, prompts(3, 9), max_new_tokens=20, eos_ids=[1, 2])
    with pytest.raises(AssertionError, match="traced"):
        generate(model, prompts(65, 9), max_new_tokens=20, eos_ids=[1, 2])


def test_a_text_ends_where_the_positions_do(tiny):
    model, asked = tiny(max_position_embeddings=40), prompts(33, 12)
    with pytest.warns(UserWarning, match=r"prompts \[0\].*40 positions"):
        found = generate(model, asked, max_new_tokens=NEW, eos_ids=[])
    assert found == [greedy(model, asked[0], 7), greedy(model, asked[1], NEW)]
    with pytest.raises(ValueError, match=r"prompts\[1\] has 40 tokens and the model 40 positions"):
        generate(model, prompts(3, 40), max_new_tokens=1, eos_ids=[])


def test_dynamic_rope_goes_beyond_its_positions(tiny):
    rope = dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
    model = tiny(max_position_embeddings=16, rope_parameters=rope)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (text,) = generate(model, prompts(12), max_new_tokens=NEW, eos_ids=[])
    assert len(text) == NEW
    assert text[:4] == greedy_at(model, prompts(12)[0], 4)


def greedy_at(model, prompt: list[int], count: int) -> list[int]:
    """`greedy` without anything behind the tokens, which dynamic frequencies would see."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_of(model, tokens, width=len(tokens))[-1].argmax()))
    return tokens[len(prompt) :]


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
        ([[1]], dict(max_new_tokens=0), "max_new_tokens is 0"),
        ([[1]], dict(temperature=-0.1), "temperature is -0.1"),
        ([[1]], dict(temperature=float("nan")), "temperature is nan"),
        ([[1]], dict(temperature=1.0, top_p=0.0), "top_p is 0.0"),
        ([[1]], dict(temperature=1.0, top_p=1.1), "top_p is 1.1"),
    ],
)
def test_refuses(tiny, asked, options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny(), asked, **dict(max_new_tokens=2, eos_ids=[]) | options)


def test_logits_that_are_not_finite_are_an_error(tiny):
    model = tiny()
    whole = generate(model, prompts(5, 6), max_new_tokens=6, eos_ids=[])
    bad = whole[1][2]
    assert bad not in whole[0] and bad not in whole[1][:2]
    embedding = model.model.embed_tokens.weight
    embedding.set_value(embedding.get_value().at[bad].set(jnp.nan))
    with pytest.raises(ValueError, match=r"prompts\[1\]: .* not finite after 3 new tokens"):
        generate(model, prompts(5, 6), max_new_tokens=6, eos_ids=[])
    assert generate(model, prompts(5, 6), max_new_tokens=6, eos_ids=[whole[1][2]])[1] == whole[1][:2]
