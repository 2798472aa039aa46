"""GGUF files: written here by the rules of llama.cpp's converter, and read back to the weights that went in."""

import logging
import sys

import gguf
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config, Qwen3Config

from jaxft.hub.load import eos_token_ids, load_model
from jaxft.hub.model_files import open_files, open_weights, read_config
from jaxft.hub.resolve import HubError, resolve_model
from jaxft.hub.save import save_model
from jaxft.models.hf_config import decoder_config

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.parity

SIZES = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 3,
}
GEMMA2 = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 16,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 20000.0}),
    "llama tied": LlamaConfig(**SIZES | {"tie_word_embeddings": True}),
    "llama linear": LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    "llama wide": LlamaConfig(**SIZES, head_dim=32),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "gemma2": Gemma2Config(**SIZES | GEMMA2),
}
QUANTS = gguf.GGMLQuantizationType


def reference(config) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else 0.08))
            parameter += "norm" in name
    return model.eval()


def interleaved(x, heads):
    """Rows of q and k as llama.cpp's rotary embedding wants them."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write(path, model, kind=QUANTS.F32, more=lambda writer: None):
    """As convert_hf_to_gguf.py writes it; matrices as `kind`."""
    config = model.config
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim != config.hidden_size // config.num_attention_heads or arch == "gemma2":
        writer.add_key_length(head_dim)
    if arch == "llama":
        writer.add_rope_dimension_count(head_dim)
    if arch == "gemma2":
        writer.add_sliding_window(config.sliding_window)
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_vocab_size(config.vocab_size)
    writer.add_eos_token_id(config.eos_token_id)
    more(writer)
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        x = tensor.numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            x = interleaved(x, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if arch == "gemma2" and name.endswith("norm.weight"):
            x = x + 1
        stored = kind if x.ndim > 1 else QUANTS.F32
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), gguf.quantize(x, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


TOKENS = np.random.default_rng(0).integers(0, 40, (2, 30), dtype=np.int32)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_weights_and_logits_are_those_that_went_in(tmp_path, config):
    model = reference(config)
    path = write(tmp_path / "model.gguf", model)
    weights = open_weights(path, read_config(path))
    expected = {n: t.numpy() for n, t in model.state_dict().items() if n in weights.names()}
    assert set(weights.names()) == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(weights.read(name), value, rtol=0, atol=3e-7)  # Gemma's norms lose their last bit
    ours = decoder_config(read_config(path))
    assert ours == decoder_config(config.to_dict())
    loaded = load_model(path)
    np.testing.assert_allclose(np.asarray(loaded(TOKENS)), logits(model, TOKENS), atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", [QUANTS.F16, QUANTS.BF16, QUANTS.Q8_0, QUANTS.Q4_0, QUANTS.Q5_1], ids=lambda k: k.name)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
def test_quantized_weights_are_those_of_transformers(tmp_path, family, kind):
    path = write(tmp_path / "model.gguf", reference(CONFIGS[family]), kind)
    options = {"config": CONFIGS[family], "dtype": torch.float32}  # it does not find the size of Qwen3's heads itself
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, **options).state_dict()
    weights = open_weights(path, read_config(path))
    assert set(weights.names()) == theirs.keys() - ({"lm_head.weight"} if family == "gemma2" else set())
    for name in weights.names():
        expected = theirs[name].numpy()
        assert weights.info(name).shape == expected.shape
        np.testing.assert_array_equal(weights.read(name), expected)
        if expected.ndim == 2:
            np.testing.assert_array_equal(weights.read(name, np.s_[5:31, 3:]), expected[5:31, 3:])
        weights.release(name)


def test_rows_of_k_quants(tmp_path):
    """Blocks of 256: only their rows as the package decodes them, since nothing here encodes them."""
    rng = np.random.default_rng(0)
    config = LlamaConfig(**SIZES | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8})
    model = reference(config)

    def add(writer):
        blocks = rng.integers(0, 256, (96, 2, 210)).astype(np.uint8)
        blocks[..., -2:] = rng.uniform(-1, 1, (96, 2, 1)).astype(np.float16).view(np.uint8)
        writer.add_tensor("blk.7.ffn_down.weight", blocks.reshape(96, 420), raw_dtype=QUANTS.Q6_K)

    path = write(tmp_path / "model.gguf", model, more=add)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.7.ffn_down.weight")
    expected = gguf.dequantize(tensor.data, tensor.tensor_type)
    weights = open_weights(path, read_config(path))
    name = "model.layers.7.mlp.down_proj.weight"
    assert weights.info(name).shape == expected.shape == (96, 512)
    np.testing.assert_array_equal(weights.read(name), expected)
    np.testing.assert_array_equal(weights.read(name, np.s_[90:, 200:300]), expected[90:, 200:300])


def test_rotary_factors_of_llama_3(tmp_path):
    """The converter turns the `llama3` scaling into a tensor of factors, one to a frequency."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = reference(LlamaConfig(**SIZES, rope_parameters=rope))
    plain = 1 / 10000.0 ** (np.arange(0, 16, 2) / 16)
    factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert 1 < len(set(np.round(factors, 3))) < 9
    path = write(tmp_path / "model.gguf", model, more=lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    np.testing.assert_allclose(np.asarray(load_model(path)(TOKENS)), logits(model, TOKENS), atol=2e-5, rtol=0)
    save_model(load_model(path), tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    np.testing.assert_allclose(logits(saved, TOKENS), logits(model, TOKENS), atol=2e-5, rtol=0)


def test_what_a_model_is_asked_for(tmp_path, caplog):
    path = write(tmp_path / "model.gguf", reference(CONFIGS["llama"]), QUANTS.Q8_0)
    assert resolve_model(str(path)).path == path
    with pytest.raises(HubError, match=r"model.gguf is a local file: a revision \(main\) applies to the Hub only"):
        resolve_model(str(path), "main")
    assert eos_token_ids(path, 7) == [3, 7]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5]}')
    assert eos_token_ids(path, 7) == [5, 7]
    with caplog.at_level(logging.WARNING, "jaxft"):
        model = load_model(path, "bfloat16")
    assert caplog.messages == [f"{path}: 16 weights quantized by gguf are dequantized to bfloat16"]
    save_model(model, tmp_path / "saved", "float32")
    assert (tmp_path / "saved" / "generation_config.json").exists()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert saved.config.rope_parameters["rope_theta"] == 20000.0
    files = open_files(path)
    assert files.info("token_embd.weight").dtype == np.uint8
    with pytest.raises(ValueError, match=r"no tensor 'token_emb.weight'; the nearest names are token_embd.weight"):
        files.info("token_emb.weight")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data[:-4], r"model.gguf: (not a GGUF file, or a damaged one|truncated: the header promises)"),
        (lambda data: data[:500], "model.gguf: not a GGUF file, or a damaged one"),
        (lambda data: b"PK" + data[2:], "model.gguf: not a GGUF file, or a damaged one"),
        (
            lambda data: data.replace(b"llama", b"tokio"),
            "GGUF architecture 'tokio' is not supported; supported: llama, ",
        ),
        (lambda data: data.replace(b"block_count", b"block_coumt"), "the header has no llama.block_count"),
    ],
)
def test_damage(tmp_path, damage, message):
    path = write(tmp_path / "model.gguf", reference(CONFIGS["llama"]))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load_model(path)


@pytest.mark.parametrize(
    "more, message",
    [
        (
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN) or w.add_rope_scaling_factor(4.0),
            "'yarn' is not",
        ),
        (lambda w: w.add_rope_dimension_count(8), "rope.dimension_count is 8; only the whole head, 16"),
        (lambda w: w.add_tensor("blk.0.x.weight", np.ones(3, np.float32)), "1 unknown to the model: blk.0.x.weight"),
        (lambda w: w.add_uint16("split.count", 3), "one of 3 parts of a model; join them"),
        (lambda w: w.add_expert_count(4), "GGUF files with experts are not supported; give the safetensors"),
    ],
)
def test_what_a_file_may_not_say(tmp_path, more, message):
    path = write(tmp_path / "model.gguf", reference(CONFIGS["qwen2"]), more=more)
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_without_the_package_it_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "model.gguf", reference(CONFIGS["llama"]))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"needs the package gguf; run: pip install 'jaxft\[gguf\]'$"):
        load_model(path)
