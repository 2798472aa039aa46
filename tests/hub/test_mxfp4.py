"""Experts in MXFP4, against transformers' own decoding."""

import json

import numpy as np
import pytest

from jaxft.hub.checkpoint import write_checkpoint
from jaxft.hub.load import load_model
from jaxft.hub.prequantized import open_directory
from jaxft.hub.safetensors import SafetensorsError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")

X = "model.layers.0.mlp.experts.gate_up_proj"
CONFIG = {"quantization_config": {"quant_method": "mxfp4"}}


def experts(experts=3, out=10, groups=2, low=100, high=140):
    rng = np.random.default_rng(0)
    return {
        f"{X}_blocks": rng.integers(0, 256, (experts, out, groups, 16)).astype(np.uint8),
        f"{X}_scales": rng.integers(low, high, (experts, out, groups)).astype(np.uint8),
    }


def stored(directory, tensors):
    plain = {f"{X}_bias": np.arange(4, dtype=np.float32)}
    write_checkpoint(directory, tensors | plain, (tensors | plain).__getitem__)
    return open_directory(directory, CONFIG)


@pytest.mark.parity
@pytest.mark.parametrize("low, high", [(100, 140), (0, 30), (240, 253)])
def test_as_transformers_decodes(tmp_path, low, high):
    tensors = experts(low=low, high=high)
    weights = stored(tmp_path, tensors)
    assert set(weights.names()) == {X, f"{X}_bias"}
    expected = mxfp4.convert_moe_packed_tensors(*map(torch.tensor, tensors.values()), dtype=torch.float32).numpy()
    assert weights.info(X).shape == expected.shape == (3, 64, 10)
    found = weights.read(X)
    assert found.dtype == weights.info(X).dtype == "bfloat16"
    np.testing.assert_array_equal(found.astype(np.float32), expected)
    for cut in (np.s_[1:2], np.s_[:, 5:9], np.s_[1:, 3:50, 2:7], np.s_[2:, 60:, ::3]):
        cut = cut if isinstance(cut, tuple) else (cut,)
        np.testing.assert_array_equal(weights.read(X, cut).astype(np.float32), expected[cut])


@pytest.mark.parity
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_whole_model(tmp_path, quantization):
    """gpt-oss as it is published, beside the same model with its experts decoded by transformers."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=97, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, sliding_window=7, pad_token_id=0,
        max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.GptOssForCausalLM(config).eval()
    rng = np.random.default_rng(0)
    packed = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.ndim == 1))
            if name.endswith(("gate_up_proj", "down_proj")):
                experts, inner, outer = parameter.shape
                packed[f"{name}_blocks"] = rng.integers(0, 256, (experts, outer, inner // 32, 16)).astype(np.uint8)
                packed[f"{name}_scales"] = rng.integers(122, 126, (experts, outer, inner // 32)).astype(np.uint8)
                both = (torch.tensor(packed[f"{name}_{part}"]) for part in ("blocks", "scales"))
                parameter.copy_(mxfp4.convert_moe_packed_tensors(*both, dtype=torch.float32))
    tensors = {name: value.numpy() for name, value in model.state_dict().items() if f"{name}_blocks" not in packed}
    tensors |= packed
    write_checkpoint(tmp_path, tensors, tensors.__getitem__)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | CONFIG))
    tokens = rng.integers(0, 97, (2, 20)).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    error = np.abs(np.asarray(load_model(tmp_path, "float32", quantization)(tokens)) - expected).max()
    assert error < 1e-4 if quantization is None else 1e-3 < error < np.abs(expected).max()


def test_by_the_table():
    """The standard's values: 1.0 is the code 2, -6.0 the code 15, and exponents have a bias of 127."""
    from jaxft.hub.mxfp4 import _PAIRS, _POWERS

    assert _PAIRS[0xF2].tolist() == [1.0, -6.0]
    assert (_POWERS[127], _POWERS[0], _POWERS[254]) == (1, 2.0**-127, 2.0**127)
    assert np.isnan(_POWERS[255])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{X}_scales"), f"{X}_scales is missing; without it {X} cannot be decoded"),
        (lambda t: t.update({f"{X}_scales": t[f"{X}_scales"][:, :-1]}), r"shape \(3, 9, 2\), expected \(3, 10, 2\)"),
        (lambda t: t.update({f"{X}_blocks": t[f"{X}_blocks"][..., :8]}), r"\(3, 10, 2, 8\), expected \[experts, out,"),
        (lambda t: t.update({f"{X}_blocks": t[f"{X}_blocks"].view(np.int8)}), "_blocks, .*, is int8, expected uint8"),
    ],
)
def test_damage(tmp_path, change, message):
    tensors = experts()
    change(tensors)
    with pytest.raises(SafetensorsError, match=message):
        stored(tmp_path, tensors)
