"""Losses of tokens by chunks against plain ones: values and gradients, whatever head, chunks, precision and mesh."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft.adapters.attach import attach
from jaxft.adapters.targets import LoraConfig
from jaxft.models.decoder import initialize, project
from jaxft.models.head import Head
from jaxft.models.hf_config import decoder_config
from jaxft.models.linear import Adapter
from jaxft.models.placement import bind
from jaxft.objectives import token_losses as module
from jaxft.objectives.token_losses import next_token_targets, token_losses
from jaxft.sharding.layout import layout_of
from jaxft.sharding.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compiles")


class Nothing(nnx.Variable):
    """The type of what is trained where nothing of the head is."""


KINDS = {
    "untied": {},
    "tied": dict(tie_word_embeddings=True),
    "bias": {},
    "softcap": dict(logits_softcap=1.5, logits_scale=0.7, tie_word_embeddings=True),
    "lora": {},
    "dora": dict(logits_softcap=2.0),
}


def make_model(kind: str, vocab_size: int = 53, hidden_size: int = 16, mesh=None):
    raw = dict(
        model_type="llama", vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, max_position_embeddings=8, rms_norm_eps=1e-5,
    )  # fmt: skip
    config = replace(decoder_config(raw | dict(tie_word_embeddings=False)), **KINDS[kind])
    model = initialize(config, jax.random.key(0), scale=0.7)
    if mesh is not None:
        bind(model, mesh)
        weight = model.head.weight
        layout = model.head.layout = layout_of("lm_head.weight", weight.get_value().shape, mesh)  # tied ones, too
        weight.set_value(jax.device_put(weight.get_value(), layout.sharding(layout.stored)))
    if kind == "bias":
        model.lm_head.bias = nnx.data(nnx.Param(jax.random.normal(jax.random.key(1), (vocab_size,))))
    if kind in ("lora", "dora"):
        targets = LoraConfig(r=3, lora_alpha=5, target_modules=["lm_head"], use_dora=kind == "dora")
        model = attach(model, targets, jax.random.key(2))
        adapter = model.lm_head.adapter
        B = adapter.B.get_value()
        adapter.B.set_value(jax.device_put(0.3 * jax.random.normal(jax.random.key(3), B.shape), B.sharding))
        if kind == "dora":
            magnitude = adapter.magnitude.get_value()
            stretched = magnitude * jnp.linspace(0.5, 1.5, vocab_size)
            adapter.magnitude.set_value(jax.device_put(stretched, magnitude.sharding))
    return model


def make_tokens(model, rows: int = 3, length: int = 17):
    """Hidden states, targets and weights; where the weight is 0 the target is none of the vocabulary."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(rows, length, model.config.hidden_size)).astype(np.float32)
    targets = rng.integers(0, model.config.vocab_size, (rows, length)).astype(np.int32)
    weights = rng.choice([0.0, 1.0, 0.5], (rows, length)).astype(np.float32)
    strays = np.where(rng.random((rows, length)) < 0.5, -100, model.config.vocab_size + 3)
    return jnp.asarray(hidden), jnp.asarray(np.where(weights == 0, strays, targets), jnp.int32), jnp.asarray(weights)


def chunked(model, trained_type, tokens):
    """The weighted sum of the losses times three, and its gradients: of what is trained and of the hidden states."""
    head, trained, frozen = model.head_pieces(trained_type)
    hidden, targets, weights = tokens

    @jax.jit
    def run(trained, frozen, hidden):
        def loss(trained, hidden):
            losses = token_losses(head, trained, frozen, hidden, targets, weights != 0)
            return 3.0 * jnp.sum(weights * losses)

        return jax.value_and_grad(loss, (0, 1))(trained, hidden)

    value, (d_trained, d_hidden) = run(trained, frozen, hidden)
    return value, [*d_trained, d_hidden]


def plain(model, trained_type, tokens):
    graph, trained, frozen = nnx.split(model.head, trained_type, ...)
    hidden, targets, weights = tokens

    @jax.jit
    @jax.value_and_grad
    def run(parts):
        logits = project(model.config, nnx.merge(graph, parts[0], frozen), parts[1])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1, mode="clip")[..., 0]
        return -3.0 * jnp.sum(weights * chosen)

    value, gradients = run((trained, hidden))
    return value, jax.tree.leaves(gradients)


def assert_same(actual, expected, tolerance=3e-6):
    assert float(actual[0]) == pytest.approx(float(expected[0]), rel=tolerance)
    assert len(actual[1]) == len(expected[1])
    for one, other in zip(actual[1], expected[1], strict=True):
        assert one.dtype == other.dtype
        error = np.linalg.norm(np.asarray(one) - np.asarray(other))
        assert error < tolerance * np.linalg.norm(other)


@pytest.fixture
def small_chunks(monkeypatch):
    def use(tokens: int, rows: int):
        monkeypatch.setattr(module, "CHUNK_TOKENS", tokens)
        monkeypatch.setattr(module, "CHUNK_ROWS", rows)

    return use


@pytest.mark.core
@pytest.mark.parametrize("trained_type", [Nothing, Adapter, nnx.Param], ids=["frozen", "adapter", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_plain_loss(kind, trained_type, small_chunks):
    small_chunks(tokens=20, rows=12)
    model = make_model(kind)
    tokens = make_tokens(model)
    assert_same(chunked(model, trained_type, tokens), plain(model, trained_type, tokens))


@pytest.mark.core
def test_without_gradients(small_chunks):
    """One product for each logit; gradients take more."""
    small_chunks(tokens=20, rows=12)
    model = make_model("dora")
    head, trained, frozen = model.head_pieces(Nothing)
    hidden, targets, weights = make_tokens(model)

    def loss(hidden):
        losses = token_losses(head, trained, frozen, hidden, targets, weights != 0)
        return jnp.sum(weights * losses)

    expected, _ = plain(model, Nothing, (hidden, targets, weights))
    assert 3 * float(jax.jit(loss)(hidden)) == pytest.approx(float(expected), rel=3e-6)
    evaluating, training = (str(jax.make_jaxpr(f)(hidden)) for f in (loss, jax.grad(loss)))
    assert 0 < evaluating.count("dot_general") < training.count("dot_general")


@pytest.mark.core
@pytest.mark.parametrize("trained_type", [Nothing, nnx.Param], ids=["frozen", "all"])
@pytest.mark.parametrize("tokens, rows", [(1, 53), (51, 1), (50, 52), (4096, 4096)])
def test_chunks_of_any_size(tokens, rows, trained_type, small_chunks):
    small_chunks(tokens, rows)
    model = make_model("untied")
    batch = make_tokens(model)
    assert_same(chunked(model, trained_type, batch), plain(model, trained_type, batch))


def test_large_chunks_are_aligned(small_chunks):
    small_chunks(tokens=64, rows=256)
    model = make_model("untied", vocab_size=600)  # 3 chunks of 256, the last of which repeats 168 rows
    tokens = make_tokens(model)
    for trained_type in (Nothing, nnx.Param):
        assert_same(chunked(model, trained_type, tokens), plain(model, trained_type, tokens))


@pytest.mark.parametrize("trained_type", [Nothing, nnx.Param], ids=["frozen", "all"])
def test_large_logits_and_no_supervision(trained_type, small_chunks):
    """Logits of some thousands, each rounded by up to 2**-12, give no inf; where nothing counts, everything is 0."""
    small_chunks(tokens=8, rows=16)
    model = make_model("untied")
    hidden, targets, weights = make_tokens(model)
    loud = 1000 * hidden, targets, weights
    assert_same(chunked(model, trained_type, loud), plain(model, trained_type, loud), 2**-11)
    value, gradients = chunked(model, trained_type, (hidden, targets, 0 * weights))
    assert value == 0
    assert all(not np.asarray(gradient).any() for gradient in gradients)


def exact(weight, hidden, targets, scale):
    """In float64: losses, and gradients of their sum with respect to hidden states [N, D] and weight."""
    weight, hidden = (np.asarray(x.astype(jnp.float32), np.float64) for x in (weight, hidden))
    logits = scale * hidden @ weight.T
    rows = np.arange(len(targets))
    own = logits[rows, targets]
    others = np.exp(logits - own[:, None])
    others[rows, targets] = 0
    missing = others.sum(axis=1)
    share = others / (1 + missing[:, None])
    share[rows, targets] = -missing / (1 + missing)
    return np.log1p(missing), scale * share @ weight, scale * share.T @ hidden


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "all"])
@pytest.mark.parametrize("fitted", [None, 0.9, 0.999, 0.99999])
def test_bfloat16(fitted, trained, small_chunks):
    """Of each token, in relation to its own gradient, however near 1 the probability of its target.

    Weights of the softmax are rounded to bfloat16, a relative error of 2**-9 each that averages out over the sum. So
    are the part of each chunk where the head is trained, and the result. Twice that holds all of it.
    """
    small_chunks(tokens=24, rows=64)
    rng = np.random.default_rng(1)
    vocab_size, width, count = 300, 64, 40
    weight = jnp.asarray(rng.normal(size=(vocab_size, width)), jnp.bfloat16)
    targets = rng.integers(0, vocab_size, count)
    hidden = rng.normal(size=(count, width)) / 4
    if fitted is not None:
        own = np.asarray(weight.astype(jnp.float32))[targets]
        others = np.sqrt(width) / 4
        hidden = hidden / others + own * (np.log(vocab_size * fitted / (1 - fitted)) + 1) / width
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    losses, d_hidden, d_weight = exact(weight, hidden, targets, 1.0)
    if fitted is not None:
        assert fitted / 3 < np.median(losses) / (1 - fitted) * fitted < fitted * 30

    def logits(trained, frozen, h):
        return jnp.dot(h, (*trained, *frozen)[0].T, preferred_element_type=jnp.float32)

    cut = (jax.sharding.PartitionSpec(None),)
    head, arrays = (Head(logits, cut, ()), ((weight,), ())) if trained else (Head(logits, (), cut), ((), (weight,)))

    def loss(trained, hidden):
        wanted = jnp.ones((1, count), bool)
        return token_losses(head, trained, arrays[1], hidden[None], jnp.asarray(targets, jnp.int32)[None], wanted).sum()

    value, (d_trained, actual) = jax.jit(jax.value_and_grad(loss, (0, 1)))(arrays[0], hidden)
    assert actual.dtype == jnp.bfloat16
    assert float(value) == pytest.approx(losses.sum(), rel=1e-4)
    error = np.linalg.norm(np.asarray(actual, np.float64) - d_hidden, axis=1) / np.linalg.norm(d_hidden, axis=1)
    assert error.max() < 2**-8
    if trained:
        error = np.asarray(d_trained[0], np.float64) - d_weight
        assert np.linalg.norm(error) < 2**-8 * np.linalg.norm(d_weight)


MESHES = {
    "tensor8": dict(tensor=8),
    "fsdp8": dict(fsdp=8),
    "data2-fsdp2-tensor2": dict(data=2, fsdp=2, tensor=2),
    "fsdp2-context2-tensor2": dict(fsdp=2, context=2, tensor=2),
    "tensor2-fsdp4": dict(tensor=2, fsdp=4),
}
LAYOUTS = [  # vocabulary, hidden size, mesh, how the head lies
    (96, 16, "tensor8", (("tensor", "fsdp"), None)),
    (96, 16, "fsdp8", (("tensor", "fsdp"), None)),
    (100, 16, "data2-fsdp2-tensor2", (("tensor", "fsdp"), None)),
    (100, 16, "fsdp2-context2-tensor2", (("tensor", "fsdp"), None)),
    (98, 16, "tensor2-fsdp4", ("tensor", "fsdp")),
    (101, 16, "tensor8", (None, ("tensor", "fsdp"))),
    (101, 16, "tensor2-fsdp4", (None, ("tensor", "fsdp"))),
    (101, 15, "fsdp2-context2-tensor2", (None, None)),
]


@pytest.mark.parametrize("kind, trained_type", [("softcap", Nothing), ("softcap", nnx.Param), ("dora", Adapter)])
@pytest.mark.parametrize("vocab_size, hidden_size, mesh, stored", LAYOUTS, ids=str)
def test_meshes_give_what_one_device_gives(vocab_size, hidden_size, mesh, stored, kind, trained_type, small_chunks):
    small_chunks(tokens=5, rows=16)
    tokens = make_tokens(make_model(kind, vocab_size, hidden_size))
    expected = plain(make_model(kind, vocab_size, hidden_size), trained_type, tokens)
    model = make_model(kind, vocab_size, hidden_size, make_mesh(MESHES[mesh]))
    assert model.head.layout.stored == jax.sharding.PartitionSpec(*stored)
    assert_same(chunked(model, trained_type, tokens), expected)


def test_bias_on_a_mesh(small_chunks):
    small_chunks(tokens=5, rows=16)
    tokens = make_tokens(make_model("bias", 100))
    expected = plain(make_model("bias", 100), nnx.Param, tokens)
    assert_same(chunked(make_model("bias", 100, mesh=make_mesh(MESHES["tensor2-fsdp4"])), nnx.Param, tokens), expected)


def test_bfloat16_on_a_mesh(small_chunks):
    """To the rounding of the result, like one device."""
    small_chunks(tokens=5, rows=16)

    def run(mesh):
        model = make_model("untied", 101, mesh=mesh)
        model.lm_head.weight.set_value(model.lm_head.weight.get_value().astype(jnp.bfloat16))
        hidden, targets, weights = make_tokens(model)
        return chunked(model, nnx.Param, (hidden.astype(jnp.bfloat16), targets, weights))

    (value, gradients), (expected, others) = run(make_mesh(MESHES["tensor2-fsdp4"])), run(None)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for one, other in zip(gradients, others, strict=True):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        assert np.linalg.norm(one - other) < 2**-8 * np.linalg.norm(other)


@pytest.mark.parametrize("trained_type", [Nothing, nnx.Param], ids=["frozen", "all"])
@pytest.mark.parametrize("mesh, ways", [(None, 1), ("data2-fsdp2-tensor2", 4), ("tensor8", 8), ("fsdp8", 8)])
def test_neither_logits_nor_the_whole_head_exist(mesh, ways, trained_type, small_chunks):
    """Of arrays with as many rows as the vocabulary, or a device's part of it, there is the stored head alone."""
    vocab_size, rows = 8 * 331, 24
    small_chunks(tokens=20, rows=rows)
    model = make_model("untied", vocab_size, 16, None if mesh is None else make_mesh(MESHES[mesh]))
    head, trained, frozen = model.head_pieces(trained_type)
    hidden, targets, weights = make_tokens(model, 8, 40)

    def loss(trained, hidden, frozen):
        losses = token_losses(head, trained, frozen, hidden, targets, weights != 0)
        return jnp.sum(weights * losses)

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(trained, hidden, frozen).compile()
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"\[([\d,]+)\]", compiled.as_text())}
    assert any(rows in shape for shape in shapes)  # chunks are seen in the text
    parts = {vocab_size // part: part for part in (1, 2, 4, 8)}
    for shape in shapes:
        for size in parts.keys() & set(shape):
            assert parts[size] == ways, shape
            assert sorted(shape) == [16, size], shape
        assert np.prod(shape) <= max(20 * rows, vocab_size // ways * 16, hidden.size), shape


@pytest.mark.parametrize("trained_type", [Adapter, nnx.Param], ids=["adapter", "all"])
def test_gradients_lie_as_what_is_trained(trained_type, small_chunks):
    small_chunks(tokens=5, rows=16)
    model = make_model("dora", 96, 16, make_mesh(MESHES["data2-fsdp2-tensor2"]))
    trained = model.head_pieces(trained_type)[1]
    gradients = chunked(model, trained_type, make_tokens(model))[1][:-1]
    for one, other in zip(gradients, trained, strict=True):
        if one.shape[0] == 96:
            assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


@pytest.mark.core
def test_targets_stay_inside_their_segment():
    tokens = jnp.array([[5, 6, 7, 8, 9, 0]], jnp.int32)
    segments = jnp.array([[1, 1, 1, 2, 2, 0]], jnp.int32)
    everything = jnp.ones((1, 6), bool)
    targets, wanted = next_token_targets(tokens, everything, segments)
    np.testing.assert_array_equal(wanted, [[1, 1, 0, 1, 0, 0]])
    np.testing.assert_array_equal(np.asarray(targets)[wanted], [6, 7, 9])
    answer_only = jnp.array([[False, False, True, False, True, False]])
    np.testing.assert_array_equal(next_token_targets(tokens, answer_only, segments)[1], [[0, 1, 0, 1, 0, 0]])
