"""A quantized checkpoint from its directory to a model, and out again."""

import json
import logging
import re

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from jaxft.hub.checkpoint import Checkpoint, write_checkpoint
from jaxft.hub.load import fingerprint, load_model, read_json
from jaxft.hub.prequantized import METHODS, open_directory
from jaxft.hub.save import save_model
from jaxft.models.decoder import describe_model
from jaxft.models.hf_config import decoder_config
from jaxft.sharding.mesh import make_mesh

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes.functional")

pytestmark = pytest.mark.parity

LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
NF4_SETTINGS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
INT8_SETTINGS = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def four_bit(name, w, nested):
    codes, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=nested, quant_type="nf4")
    return {name: codes} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


def eight_bit(name, w):
    codes, scales, _ = bnb.int8_vectorwise_quant(w.half())
    return {name: codes, f"{name.removesuffix('.weight')}.SCB": scales}


@pytest.fixture(scope="module")
def plain(random_checkpoint):
    return random_checkpoint(LLAMA)


@pytest.fixture
def quantized(plain, tmp_path):
    """`quantized(encode, settings, edit)`: the plain model with its projections encoded, as a directory."""

    def make(encode, settings, edit=lambda tensors: None):
        directory = tmp_path / "quantized"
        directory.mkdir()
        tensors = {}
        with Checkpoint.open(plain) as checkpoint:
            for name in checkpoint.names():
                value = torch.tensor(checkpoint.read(name))
                tensors |= encode(name, value) if name.endswith("_proj.weight") else {name: value}
        tensors = {name: value.numpy() for name, value in tensors.items()}
        edit(tensors)
        write_checkpoint(directory, tensors, tensors.__getitem__)
        (directory / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": settings}))
        return directory

    return make


def nf4(name, w):
    return four_bit(name, w, nested=False)


def double_nf4(name, w):
    return four_bit(name, w, nested=True)


def arrays(model):
    return nnx.to_pure_dict(nnx.state(model))


def test_nf4_becomes_what_quantizing_the_original_gives(plain, quantized):
    """Where bitsandbytes writes plain scales every bit is equal, with devices to share the weights or without."""
    directory = quantized(nf4, NF4_SETTINGS)
    for mesh in (None, make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        chex.assert_trees_all_equal(
            arrays(load_model(directory, quantization="nf4", mesh=mesh)),
            arrays(load_model(plain, quantization="nf4", mesh=mesh)),
        )


@pytest.mark.parametrize(
    "encode, settings, form", [(double_nf4, NF4_SETTINGS, "nf4"), (eight_bit, INT8_SETTINGS, "int8")]
)
def test_kept_codes_are_the_dequantized_weights(quantized, encode, settings, form):
    directory = quantized(encode, settings)
    kept, dequantized = load_model(directory, quantization=form), load_model(directory)
    tokens = np.random.default_rng(0).integers(0, 40, (2, 9), dtype=np.int32)
    np.testing.assert_allclose(kept(tokens), dequantized(tokens), atol=2e-5, rtol=0)
    described = describe_model(decoder_config(read_json(directory / "config.json")), "float32", None)
    shapes = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), arrays(each)) for each in (described, dequantized)]
    assert shapes[0] == shapes[1]


def test_a_dequantized_model_is_saved_as_a_plain_one(quantized, tmp_path):
    directory = quantized(double_nf4, NF4_SETTINGS)
    model = load_model(directory)
    save_model(model, tmp_path / "saved")
    assert "quantization_config" not in read_json(tmp_path / "saved" / "config.json")
    shown = open_directory(directory, read_json(directory / "config.json"))
    written = Checkpoint.open(tmp_path / "saved")
    assert set(written.names()) == set(shown.names())
    for name in written.names():
        np.testing.assert_array_equal(written.read(name), shown.read(name))
    chex.assert_trees_all_equal(arrays(load_model(tmp_path / "saved")), arrays(model))


def test_large_weights_are_decoded_in_pieces(quantized, monkeypatch):
    directory = quantized(double_nf4, NF4_SETTINGS)
    shown, name = open_directory(directory, read_json(directory / "config.json")), "model.layers.1.mlp.up_proj.weight"
    whole = shown.read(name)
    monkeypatch.setattr("jaxft.hub.prequantized._CHUNK", 1000)
    for cut in (np.s_[:, :], np.s_[3:100, :], np.s_[1:, 7:50]):
        np.testing.assert_array_equal(shown.read(name, cut), whole[cut])


def test_a_model_is_known_by_its_stored_tensors(quantized):
    directory = quantized(double_nf4, NF4_SETTINGS)
    expected = fingerprint(Checkpoint.open(directory))
    assert load_model(directory).source.fingerprint == expected
    assert load_model(directory, quantization="nf4").source.fingerprint == expected


KEEP_4 = r"; load_in_4bit \(quantization nf4\) keeps their codes$"
KEEP_8 = r"; load_in_8bit \(quantization int8\) keeps their codes$"


@pytest.mark.parametrize(
    "encode, settings, form, told",
    [
        (
            nf4,
            NF4_SETTINGS,
            None,
            "quantized: 21 weights quantized by bitsandbytes are dequantized to bfloat16" + KEEP_4,
        ),
        (nf4, NF4_SETTINGS, "int8", r"are dequantized, and those of the layers quantized as Int8\(\)" + KEEP_4),
        (eight_bit, INT8_SETTINGS, None, "dequantized to bfloat16" + KEEP_8),
        (nf4, NF4_SETTINGS, "nf4", None),
        (eight_bit, INT8_SETTINGS, "int8", None),
    ],
)
def test_codes_are_not_lost_silently(quantized, caplog, encode, settings, form, told):
    directory = quantized(encode, settings)
    with caplog.at_level(logging.WARNING, "jaxft"):
        load_model(directory, "bfloat16", form)
    assert len(caplog.messages) == (told is not None)
    if told:
        assert caplog.records[0].name == "jaxft.hub.kept"
        assert re.search(told, caplog.messages[0]), caplog.messages[0]


def test_weights_left_in_full_precision_are_named_when_they_are_quantized(quantized, caplog):
    """As checkpoints leave some layers out on purpose."""

    def encode(name, w):
        return {name: w} if "layers.1.mlp" in name else nf4(name, w)

    directory = quantized(encode, {"quant_method": "bitsandbytes"})
    with caplog.at_level(logging.WARNING, "jaxft"):
        load_model(directory, quantization="nf4")
    (message,) = caplog.messages
    assert re.search(
        r": 3 weights that this checkpoint keeps in full precision are quantized as NF4.*layers\.1\.mlp", message
    )


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_biases_beside_weights_that_have_none(quantized, value):
    """Quantizers write zeros there; anything else would be lost."""
    module = "model.layers.1.mlp.up_proj"

    def add_bias(tensors):
        tensors[f"{module}.bias"] = np.full(128, value, np.float32)

    directory = quantized(nf4, {"quant_method": "bitsandbytes"}, add_bias)
    if value:
        with pytest.raises(ValueError, match=rf"1 unknown to the model: {module}\.bias"):
            load_model(directory)
    else:
        load_model(directory)


def test_what_no_format_explains_is_refused(quantized):
    def add(tensors):
        tensors["model.layers.0.self_attn.q_proj.weight.more"] = np.ones(3, np.float32)

    directory = quantized(nf4, NF4_SETTINGS, add)
    with pytest.raises(ValueError, match=r"1 unknown to the model: model.layers.0.self_attn.q_proj.weight.more$"):
        load_model(directory)


def test_a_weight_of_another_shape_is_refused(quantized):
    def swap(tensors):
        one, other = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))
        for name in list(tensors):
            if name.startswith(one):
                twin = other + name.removeprefix(one)
                tensors[name], tensors[twin] = tensors[twin], tensors[name]

    directory = quantized(nf4, NF4_SETTINGS, swap)
    with pytest.raises(
        ValueError, match=r"2 of another shape: .*down_proj.weight is \(128, 64\), expected \(64, 128\)"
    ):
        load_model(directory)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quant_method": "exl2"}, rf"quantized by 'exl2', which is not supported; supported: {', '.join(METHODS)}\. "),
        ({}, "quantized by None, which is not supported"),
        ("awq", "config.json: the quantization settings are 'awq', not an object"),
        ({"quant_method": "fp8"}, r"_proj.weight is uint8, and nothing says how to decode it: .* format than fp8$"),
    ],
)
def test_methods_that_do_not_fit(quantized, settings, message):
    with pytest.raises(ValueError, match=message):
        load_model(quantized(nf4, settings))


def test_quantized_gpt2_is_refused(quantized):
    config = LLAMA | {"model_type": "gpt2", "quantization_config": NF4_SETTINGS}
    with pytest.raises(ValueError, match="quantized checkpoints of gpt2 are not supported"):
        open_directory(quantized(nf4, NF4_SETTINGS), config)
