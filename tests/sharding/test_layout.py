"""Every parameter of every family has its place on a mesh, and the model gives there what it gives on one device."""

import math

import jax
import numpy as np
import pytest

import jaxft
from jaxft.models.decoder import describe, parameters
from jaxft.models.families import FAMILIES
from jaxft.models.hf_config import decoder_config
from jaxft.sharding.layout import layout_of
from jaxft.sharding.mesh import make_mesh


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_layout(family):
    """Nearly all of a model is cut over all devices: what is not are norms, biases, routers and sinks."""
    mesh = make_mesh(dict(fsdp=2, tensor=2), jax.devices()[:4])
    model = describe(decoder_config({"model_type": family, "num_hidden_layers": 4, "n_layer": 4}))
    whole = cut = 0
    for parameter, _ in parameters(model):
        sharding = layout_of(parameter.name, parameter.shape, mesh)
        whole += math.prod(parameter.shape)
        cut += math.prod(sharding.sharding(sharding.stored).shard_shape(parameter.shape))
    assert cut < 0.26 * whole


SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64,
)  # fmt: skip
ODD = {
    "gpt2": dict(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": SIZES | dict(tie_word_embeddings=False),
    "phi3": SIZES | dict(tie_word_embeddings=False, pad_token_id=0),
}
"""Fused and transposed projections, norms with biases, learned positions."""


@pytest.mark.parametrize("family", ODD)
def test_logits_of_one_device(random_checkpoint, family):
    directory = random_checkpoint(dict(model_type=family) | ODD[family])
    tokens = np.random.default_rng(0).integers(0, 96, (4, 12), dtype=np.int32)
    expected = jaxft.load_model(directory)(tokens)
    model = jaxft.load_model(directory, mesh=make_mesh(dict(data=2, fsdp=2, tensor=2)))
    np.testing.assert_allclose(jax.jit(lambda m, t: m(t))(model, tokens), expected, atol=2e-5)
