"""Folded scales: the same function for PEFT, and scale 1 by every reader's rule."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxft
from jaxft.adapters.attach import Factors, attach, attach_factors, factors_of
from jaxft.adapters.portable import portable
from jaxft.adapters.targets import LoraConfig
from jaxft.hub.consumers import adapter_of, consumers

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MIXTRAL = LLAMA | {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 67,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "tie_word_embeddings": True,
}
TOKENS = np.random.default_rng(0).integers(0, 67, (2, 13), dtype=np.int32)

VARIANTS = {
    "plain": (LLAMA, dict(r=4, lora_alpha=7)),
    "rslora": (LLAMA, dict(r=5, lora_alpha=3, use_rslora=True)),
    "rslora-ranks": (LLAMA, dict(r=4, lora_alpha=8, use_rslora=True, rank_pattern={"v_proj": 9, "0.mlp.up_proj": 1})),
    "alphas": (LLAMA, dict(r=4, lora_alpha=8, alpha_pattern={"q_proj": 1.5, r"layers\.1\..*": 40})),
    "both": (LLAMA, dict(r=4, lora_alpha=8, rank_pattern={"k_proj": 2}, alpha_pattern={"k_proj": 32})),
    "query-only": (LLAMA, dict(r=2, lora_alpha=8, target_modules=["q_proj"])),
    "one-layer": (LLAMA, dict(r=2, lora_alpha=8, target_modules=["v_proj", "lm_head"], layers_to_transform=[1])),
    "experts": (MIXTRAL, dict(r=3, lora_alpha=5, target_modules="all-linear")),
    "gpt2": (GPT2, dict(r=3, lora_alpha=5, use_rslora=True, target_modules="all-linear")),
}  # fmt: skip


def randomised(model, config):
    rng = np.random.default_rng(1)
    factors = {
        name: Factors(*(None if x is None else rng.normal(x, 0.2, x.shape).astype(np.float32) for x in one))
        for name, one in factors_of(attach(model, config, jax.random.key(0))).items()
    }
    return attach_factors(model, config, factors)


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def tuned(request, random_checkpoint):
    raw, settings = request.param
    base = random_checkpoint(raw)
    return base, randomised(jaxft.load_model(base), LoraConfig(**{"target_modules": "all-linear"} | settings))


def test_the_same_logits_here_and_in_peft(tuned, tmp_path):
    base, model = tuned
    folded = portable(model)
    before, after = (np.asarray(one(TOKENS)) for one in (model, folded))
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max(), rtol=0)
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    for name, one in (("given", model), ("portable", folded)):
        jaxft.save_adapter(one, tmp_path / name)
    found = []
    for name in ("given", "portable"):
        plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        wrapped = peft.PeftModel.from_pretrained(plain, tmp_path / name).eval()
        with torch.no_grad():
            found.append(wrapped(torch.tensor(TOKENS)).logits.numpy())
    np.testing.assert_allclose(*found, atol=1e-5 * np.abs(found[0]).max(), rtol=0)


def test_every_rule_of_scaling_gives_one(tuned, tmp_path):
    """alpha / r of the settings, alpha over the rank of a tensor, with patterns or without."""
    jaxft.save_adapter(portable(tuned[1]), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["rank_pattern"], config["alpha_pattern"]) == (False, {}, {})
    assert config["lora_alpha"] == config["r"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    ranks = {len(value) for name, value in tensors.items() if name.endswith("lora_A.weight")}
    assert ranks == {config["r"]}
    names = {name.split(".self_attn.")[-1].split(".")[0] for name in tensors if ".self_attn." in name}
    assert names & {"q_proj", "v_proj"} in (set(), {"q_proj", "v_proj"})
    told = [
        line for line in consumers(adapter_of(portable(tuned[1]), tuned[0])) if "scale" in line or "together" in line
    ]
    assert told == []


def test_dora_is_refused(random_checkpoint):
    model = attach(
        jaxft.load_model(random_checkpoint(LLAMA)), LoraConfig(r=2, lora_alpha=4, use_dora=True), jax.random.key(0)
    )
    with pytest.raises(ValueError, match=r"DoRA rescales .* export it with --format merged"):
        portable(model)
    with pytest.raises(ValueError, match="carries no adapter"):
        portable(jaxft.load_model(random_checkpoint(LLAMA)))


# What is told of an adapter


def told(raw, random_checkpoint, **settings) -> list[str]:
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings)
    base = random_checkpoint(raw)
    return consumers(adapter_of(attach(jaxft.load_model(base), config, jax.random.key(0)), base))


def test_a_plain_adapter_needs_no_word(random_checkpoint):
    assert told(LLAMA, random_checkpoint) == []
    assert told(LLAMA, random_checkpoint, r=16, target_modules=["q_proj", "v_proj"]) == []
    assert told(MIXTRAL, random_checkpoint) == []


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(use_dora=True), ["vLLM, SGLang and llama.cpp do not take DoRA: export it with --format merged"]),
        (dict(use_dora=True, use_rslora=True), ["vLLM, SGLang and llama.cpp do not take DoRA: "]),
        (dict(use_rslora=True), ["llama.cpp and SGLang do not know rsLoRA and would scale the adapter wrongly: "]),
        (dict(alpha_pattern={"q_proj": 4}), ["llama.cpp and SGLang take one alpha for all modules "]),
        (dict(rank_pattern={"q_proj": 2}), ["SGLang takes one rank for all modules "]),
        (dict(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 4}), ["llama.cpp and SGLang take one alpha "]),
        (dict(r=17), ["vLLM needs --max-lora-rank 32"]),
        (dict(r=64), ["vLLM needs --max-lora-rank 64"]),
        (dict(rank_pattern={"v_proj": 33}), ["SGLang takes one rank ", "vLLM needs --max-lora-rank 64"]),
        (dict(r=600), ["vLLM takes ranks up to 512, not 600: "]),
        (dict(target_modules=["q_proj"]), ["SGLang needs .* together; 3 layers have none on v_proj: "]),
        (dict(target_modules=["v_proj"], layers_to_transform=[0]), ["SGLang needs .* one layer has none on q_proj: "]),
    ],
)  # fmt: skip
def test_who_will_not_take_it(random_checkpoint, settings, expected):
    lines = told(LLAMA, random_checkpoint, **settings)
    assert len(lines) == len(expected), lines
    for line, pattern in zip(lines, expected, strict=True):
        assert re.match(pattern, line), line


def test_what_depends_on_the_base(random_checkpoint):
    (line,) = told(GPT2, random_checkpoint)
    assert line.startswith("llama.cpp refuses this base's adapters or reads them transposed, and vLLM takes none")
    model = attach(jaxft.load_model(random_checkpoint(LLAMA)), LoraConfig(4, 8), jax.random.key(0))
    plain = adapter_of(model, Path("model"))
    (line,) = consumers(adapter_of(model, Path("model.gguf")))
    assert line.endswith("name the repository it was made from with export.py --format peft --base-name ORG/NAME")
    (line,) = consumers(replace(plain, parameters=frozenset({"model.layers.0.mlp.experts.down_proj"})))
    assert line.startswith("SGLang and llama.cpp do not take adapters on experts in one tensor")
    assert plain.rank == 4
