"""Logits against transformers, in float32, for every architecture with every axis of its config exercised."""

import copy
import re

import chex
import jax
import numpy as np
import pytest

import jaxft
from jaxft.adapters.attach import Factors, attach, attach_factors, factors_of
from jaxft.adapters.targets import LoraConfig
from jaxft.data.batch import Batch
from jaxft.generation.generate import generate
from jaxft.hub.peft_experts import unflat
from jaxft.models.hf_config import decoder_config
from jaxft.models.linear import Adapter
from jaxft.objectives.sft import Sft
from jaxft.training.state import Partition
from jaxft.training.step import tally

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.parity

TOLERANCE = 1e-5
"""Of logits, as a part of the largest; random models of 64 positions differ by up to 9e-6 in float32."""
VOCAB, LENGTH = 131, 48

SMALL = dict(vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=3, max_position_embeddings=64)
LLAMA3 = dict(
    rope_type="llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
    rope_theta=500.0,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=1000.0)
LONGROPE = dict(
    rope_type="longrope",
    short_factor=[1.0, 1.1, 1.3, 1.7],
    long_factor=[1.0, 2.0, 3.0, 5.0],
    original_max_position_embeddings=32,
    factor=2.0,
    rope_theta=100.0,
)


def llama(**kwargs):
    heads = dict(num_attention_heads=6, num_key_value_heads=2, head_dim=8)
    return transformers.LlamaConfig(**(SMALL | heads | kwargs))


def rope(**parameters):
    return llama(rope_parameters=parameters)


CONFIGS = {
    "llama-gqa": llama(),
    "llama-tied": llama(tie_word_embeddings=True),
    "llama-mha-biases": llama(num_key_value_heads=6, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3),
    "llama-wide-heads": llama(head_dim=14, hidden_act="gelu"),
    "llama-gelu-tanh": llama(
        hidden_act="gelu_pytorch_tanh", rope_parameters=dict(rope_type="default", rope_theta=99.0)
    ),
    "rope-linear": rope(rope_type="linear", factor=3.0, rope_theta=1e4),
    "rope-dynamic-short": rope(rope_type="dynamic", factor=2.0, rope_theta=1e4),
    "rope-dynamic-long": llama(
        max_position_embeddings=32, rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
    ),
    "rope-llama3": rope(**LLAMA3),
    "rope-yarn": rope(**YARN),
    "rope-yarn-mscale": rope(**YARN, mscale=0.7, mscale_all_dim=0.3, beta_fast=16.0, beta_slow=2.0),
    "rope-yarn-no-truncate": rope(**YARN, attention_factor=1.3, truncate=False),
    "rope-longrope-long": rope(**LONGROPE),
    "rope-longrope-short": rope(**LONGROPE | dict(original_max_position_embeddings=56, attention_factor=1.2)),
    "mistral-window": transformers.MistralConfig(
        **SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=7
    ),
    "mistral-full": transformers.MistralConfig(
        **SMALL, num_attention_heads=4, num_key_value_heads=1, head_dim=12, sliding_window=None
    ),
    "mistral-tied": transformers.MistralConfig(
        **SMALL,
        num_attention_heads=6,
        num_key_value_heads=3,
        sliding_window=None,
        tie_word_embeddings=True,
        hidden_act="gelu",
        rope_parameters=YARN,
    ),
    "qwen2-linear-rope": transformers.Qwen2Config(
        **SMALL,
        num_attention_heads=3,
        num_key_value_heads=1,
        rms_norm_eps=1e-3,
        rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=50.0),
    ),
    "qwen3-tied-yarn": transformers.Qwen3Config(
        **SMALL,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        rope_parameters=YARN,
    ),
    "qwen2": transformers.Qwen2Config(**SMALL, num_attention_heads=4, num_key_value_heads=2),
    "qwen2-mixed-windows": transformers.Qwen2Config(
        **SMALL | dict(num_hidden_layers=5),
        num_attention_heads=4,
        num_key_value_heads=4,
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=2,
        tie_word_embeddings=True,
    ),
    "qwen3": transformers.Qwen3Config(
        **SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=20, attention_bias=True
    ),
    "qwen3-alternating": transformers.Qwen3Config(
        **SMALL | dict(num_hidden_layers=7),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    ),
}


HEADS = dict(num_attention_heads=4, num_key_value_heads=2)
LONGROPE_HALF = LONGROPE | dict(short_factor=[1.0, 1.5], long_factor=[2.0, 5.0], partial_rotary_factor=0.5)


def typed(*kinds: str) -> dict:
    """As many layers as letters: s slides, f sees everything."""
    names = {"s": "sliding_attention", "f": "full_attention"}
    return dict(layer_types=[names[kind] for kind in "".join(kinds)], num_hidden_layers=len("".join(kinds)))


def by_type(full: dict, sliding: dict) -> dict:
    return dict(rope_parameters={"full_attention": full, "sliding_attention": sliding})


def gemma(**kwargs):
    return transformers.GemmaConfig(**(SMALL | HEADS | dict(head_dim=12) | kwargs))


def gemma2(**kwargs):
    return transformers.Gemma2Config(
        **(SMALL | HEADS | dict(head_dim=12, sliding_window=7, query_pre_attn_scalar=60) | kwargs)
    )


def gemma3(**kwargs):
    basics = SMALL | HEADS | dict(head_dim=12, sliding_window=7, query_pre_attn_scalar=20)
    return transformers.Gemma3TextConfig(**(basics | kwargs))


def granite(**kwargs):
    scales = dict(attention_multiplier=0.2, embedding_multiplier=1.7, residual_multiplier=0.6, logits_scaling=1.3)
    return transformers.GraniteConfig(**(SMALL | HEADS | scales | kwargs))


def smollm3(**kwargs):
    return transformers.SmolLM3Config(**(SMALL | HEADS | dict(num_hidden_layers=5, pad_token_id=0) | kwargs))


def olmo2(**kwargs):
    return transformers.Olmo2Config(**(SMALL | HEADS | kwargs))


def olmo3(**kwargs):
    return transformers.Olmo3Config(**(SMALL | HEADS | dict(sliding_window=7) | typed("sfsfs") | kwargs))


def cohere2(**kwargs):
    basics = SMALL | HEADS | dict(sliding_window=7, logit_scale=0.7) | typed("ssfs")
    return transformers.Cohere2Config(**(basics | kwargs))


def glm(**kwargs):
    return transformers.GlmConfig(**(SMALL | HEADS | dict(head_dim=12, pad_token_id=0, eos_token_id=1) | kwargs))


def glm4(**kwargs):
    rope = dict(rope_type="default", rope_theta=100.0, partial_rotary_factor=0.5)
    basics = SMALL | HEADS | dict(head_dim=12, rope_parameters=rope, pad_token_id=0)
    return transformers.Glm4Config(**(basics | kwargs))


def phi3(**kwargs):
    return transformers.Phi3Config(**(SMALL | HEADS | dict(pad_token_id=0) | kwargs))


def starcoder2(**kwargs):
    return transformers.Starcoder2Config(**(SMALL | HEADS | dict(pad_token_id=0) | kwargs))


def gpt_neox(**kwargs):
    return transformers.GPTNeoXConfig(**(SMALL | dict(num_attention_heads=3, pad_token_id=0) | kwargs))


def gpt2(**kwargs):
    basics = dict(vocab_size=VOCAB, n_embd=48, n_layer=3, n_head=4, n_positions=64, pad_token_id=0)
    return transformers.GPT2Config(**(basics | kwargs))


def qwen3_moe(**kwargs):
    moe = dict(head_dim=12, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=40, pad_token_id=0)
    return transformers.Qwen3MoeConfig(**(SMALL | HEADS | moe | kwargs))


def qwen2_moe(**kwargs):
    moe = dict(num_experts=6, moe_intermediate_size=40, shared_expert_intermediate_size=56, pad_token_id=0)
    return transformers.Qwen2MoeConfig(**(SMALL | HEADS | moe | kwargs))


def mixtral(**kwargs):
    return transformers.MixtralConfig(**(SMALL | HEADS | dict(num_local_experts=5, pad_token_id=0) | kwargs))


def gpt_oss(**kwargs):
    moe = dict(head_dim=12, num_local_experts=6, num_experts_per_tok=2, sliding_window=7, pad_token_id=0)
    yarn = YARN | dict(truncate=False, beta_fast=32.0, beta_slow=1.0)
    return transformers.GptOssConfig(**(SMALL | HEADS | moe | typed("sfsf") | dict(rope_parameters=yarn) | kwargs))


CONFIGS |= {
    "qwen3-moe": qwen3_moe(norm_topk_prob=True),
    "qwen3-moe-some-dense": qwen3_moe(num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3]),
    "qwen3-moe-biases-tied": qwen3_moe(
        attention_bias=True, tie_word_embeddings=True, num_experts_per_tok=1, use_sliding_window=True, sliding_window=7
    ),
    "qwen2-moe": qwen2_moe(),
    "qwen2-moe-window": qwen2_moe(
        norm_topk_prob=True, use_sliding_window=True, sliding_window=7, max_window_layers=1, num_hidden_layers=4
    ),
    "qwen2-moe-no-bias": qwen2_moe(qkv_bias=False, decoder_sparse_step=3, hidden_act="gelu"),
    "mixtral": mixtral(),
    "mixtral-window": mixtral(sliding_window=7, num_experts_per_tok=1, num_key_value_heads=4),
    "mixtral-all-experts": mixtral(num_local_experts=4, num_experts_per_tok=4, tie_word_embeddings=True, head_dim=20),
    "gpt-oss": gpt_oss(),
    "gpt-oss-plain-rope": gpt_oss(
        rope_parameters=dict(rope_type="default", rope_theta=100.0), attention_bias=False, swiglu_limit=0.2
    ),
    "gpt-oss-tied": gpt_oss(tie_word_embeddings=True, swiglu_alpha=1.0, num_experts_per_tok=5, **typed("ffs")),
    "gpt2": gpt2(),
    "gpt2-untied-wide": gpt2(tie_word_embeddings=False, n_inner=100, activation_function="gelu"),
    "gpt2-unscaled": gpt2(scale_attn_weights=False, layer_norm_epsilon=1e-2, n_head=6),
    "starcoder2": starcoder2(),
    "starcoder2-window-no-bias": starcoder2(sliding_window=7, use_bias=False, num_key_value_heads=1),
    "starcoder2-untied": starcoder2(tie_word_embeddings=False, hidden_act="gelu", norm_epsilon=1e-2),
    "gpt-neox": gpt_neox(),
    "gpt-neox-sequential": gpt_neox(use_parallel_residual=False, layer_norm_eps=1e-2, hidden_act="gelu_new"),
    "gpt-neox-tied-all-turns": gpt_neox(
        tie_word_embeddings=True,
        attention_bias=False,
        rope_parameters=dict(rope_type="default", rope_theta=99.0, partial_rotary_factor=1.0),
    ),
    "gemma": gemma(),
    "gemma-one-kv-head": gemma(num_key_value_heads=1, attention_bias=True, hidden_act="gelu"),
    "gemma-untied": gemma(tie_word_embeddings=False, rms_norm_eps=1e-3),
    "gemma2": gemma2(attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma2-uncapped": gemma2(attn_logit_softcapping=None, final_logit_softcapping=None, **typed("ffs")),
    "gemma2-biases": gemma2(attention_bias=True, attn_logit_softcapping=5.0, **typed("sfssf")),
    "gemma3": gemma3(
        **typed("ssfssf"),
        **by_type(dict(rope_type="linear", factor=4.0, rope_theta=1e4), dict(rope_type="default", rope_theta=50.0)),
    ),
    "gemma3-all-local": gemma3(**typed("sss"), attn_logit_softcapping=3.0, final_logit_softcapping=5.0),
    "gemma3-untied": gemma3(**typed("fs"), attention_bias=True, tie_word_embeddings=False),
    "granite": granite(),
    "granite-tied-biases": granite(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "granite-llama3-rope": granite(rope_parameters=LLAMA3, num_key_value_heads=4),
    "smollm3": smollm3(),
    "smollm3-sliding": smollm3(
        use_sliding_window=True, sliding_window=6, no_rope_layers=[0, 1, 1, 0, 1], **typed("sfssf")
    ),
    "smollm3-untied-biases": smollm3(
        tie_word_embeddings=False, attention_bias=True, mlp_bias=True, no_rope_layer_interval=2
    ),
    "olmo2": olmo2(),
    "olmo2-mha-biases": olmo2(num_key_value_heads=4, attention_bias=True, rms_norm_eps=1e-3),
    "olmo2-tied": olmo2(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=77.0)),
    "olmo3": olmo3(),
    "olmo3-yarn": olmo3(**by_type(YARN, dict(rope_type="default", rope_theta=100.0))),
    "olmo3-all-full": olmo3(**typed("fff"), attention_bias=True),
    "cohere2": cohere2(),
    "cohere2-biases": cohere2(attention_bias=True, layer_norm_eps=1e-2, num_key_value_heads=1),
    "cohere2-untied": cohere2(tie_word_embeddings=False, **typed("fsf")),
    "glm": glm(),
    "glm-no-bias-tied": glm(attention_bias=False, tie_word_embeddings=True, hidden_act="gelu", num_key_value_heads=1),
    "glm-all-turns": glm(rope_parameters=dict(rope_type="default", rope_theta=50.0, partial_rotary_factor=1.0)),
    "glm4": glm4(),
    "glm4-no-bias": glm4(attention_bias=False, tie_word_embeddings=True),
    "glm4-all-turns": glm4(rope_parameters=dict(rope_type="default", rope_theta=1e3, partial_rotary_factor=1.0)),
    "phi3": phi3(),
    "phi3-window": phi3(sliding_window=7, num_key_value_heads=4, tie_word_embeddings=True),
    "phi3-longrope-partial": phi3(hidden_size=32, original_max_position_embeddings=32, rope_parameters=LONGROPE_HALF),
}


def random_model(config, seed: int):
    """A transformers model whose every parameter, norms and biases too, is random and matters."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """The same random model in transformers and in jaxft."""
    path = tmp_path_factory.mktemp("model")
    reference = random_model(CONFIGS[request.param], seed=len(request.param))
    reference.save_pretrained(path)
    return reference, jaxft.load_model(path)


def torch_logits(reference, tokens, **kwargs):
    with torch.no_grad():
        return reference(torch.tensor(tokens), **kwargs).logits.numpy()


def assert_logits_agree(ours, theirs) -> None:
    """Within `TOLERANCE` of the largest logit."""
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE * np.abs(theirs).max(), rtol=0)


def test_logits_agree(pair):
    reference, model = pair
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH), dtype=np.int32)
    ours = jax.jit(lambda m, t: m(t))(model, tokens)
    assert ours.dtype == np.float32
    assert_logits_agree(ours, torch_logits(reference, tokens))


def test_padded_batch_agrees(pair):
    """Left padding as transformers takes it: a mask and explicit positions."""
    reference, model = pair
    tokens = np.random.default_rng(1).integers(0, VOCAB, (3, 21), dtype=np.int32)
    mask = np.arange(21)[None, :] >= np.array([0, 6, 13])[:, None]
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    theirs = torch_logits(
        reference, tokens, attention_mask=torch.tensor(mask.astype(int)), position_ids=torch.tensor(positions)
    )
    ours = np.asarray(model(tokens, positions, mask.astype(np.int32)))
    assert_logits_agree(ours[mask], theirs[mask])


def test_packed_row_equals_its_examples_alone(pair):
    reference, model = pair
    lengths = (17, 3, 20)
    tokens = np.random.default_rng(2).integers(0, VOCAB, (1, sum(lengths) + 5), dtype=np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    start = 0
    for number, length in enumerate(lengths, 1):
        segments[0, start : start + length] = number
        positions[0, start : start + length] = np.arange(length)
        start += length
    packed = np.asarray(model(tokens, positions, segments))
    start = 0
    for length in lengths:
        alone = torch_logits(reference, tokens[:, start : start + length])
        assert_logits_agree(packed[:, start : start + length], alone)
        start += length


# In and out, for one model of each family

EVERY = list({config.model_type: name for name, config in reversed(CONFIGS.items())}.values())


@pytest.mark.parametrize("pair", EVERY, indirect=True)
def test_transformers_reads_what_is_written(pair, tmp_path):
    reference, model = pair
    jaxft.save_model(model, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = reference.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("pair", EVERY, indirect=True)
def test_greedy_texts_are_those_of_transformers(pair):
    """32 tokens after prompts of different lengths, through the cache."""
    reference, model = pair
    prompts = [np.random.default_rng(length).integers(3, VOCAB, length).tolist() for length in (9, 4)]
    reference.generation_config.eos_token_id = None
    texts = generate(model, prompts, max_new_tokens=32, eos_ids=())
    for prompt, text in zip(prompts, texts, strict=True):
        with torch.no_grad():
            whole = reference.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False, pad_token_id=0)
        assert text == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize("pair", EVERY, indirect=True)
def test_adapters_agree_with_peft(pair, tmp_path):
    """On all linear layers, fused and transposed ones too, out to PEFT and back in."""
    reference, base = pair
    config = LoraConfig(r=3, lora_alpha=6)
    random = np.random.default_rng(0)
    factors = {
        module: Factors(*(random.normal(0, 0.1, part.shape).astype(np.float32) for part in (one.A, one.B)))
        for module, one in factors_of(attach(base, config, jax.random.key(0))).items()
    }
    model = attach_factors(base, config, factors)
    jaxft.save_adapter(model, tmp_path)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (2, 20), dtype=np.int32)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path, is_trainable=True).eval()
    ours, theirs = np.asarray(model(tokens)), torch_logits(adapted, tokens)
    assert np.abs(theirs - torch_logits(reference, tokens)).max() > 0.05
    assert_logits_agree(ours, theirs)
    every_linear = peft.LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    wanted = peft.get_peft_model(copy.deepcopy(reference), every_linear).targeted_module_names
    assert sorted(name for name in factors if ".experts." not in name) == sorted(wanted)
    again = factors_of(jaxft.load_adapter(base, tmp_path))
    chex.assert_trees_all_equal(again, factors)

    adapted(torch.tensor(tokens), labels=torch.tensor(tokens).long()).loss.backward()
    for module, gradient in gradients(model, tokens).items():
        for part, value in (("A", gradient.A), ("B", gradient.B)):
            expected = torch_gradient(adapted, base.config, module, part)
            assert np.linalg.norm(value - expected) < 1e-4 * np.linalg.norm(expected), (module, part)


def gradients(model, tokens):
    """Of the mean cross-entropy, by module."""
    partition = Partition(model, Adapter)
    trained, frozen = partition.split(model)
    batch = Batch(tokens, np.ones_like(tokens, bool), np.ones_like(tokens), np.indices(tokens.shape, np.int32)[1])

    def loss(trained):
        total, count = tally(partition.join(trained, frozen), Adapter, Sft(), batch, None)[:2]
        return total / count

    return factors_of(partition.join(jax.jit(jax.grad(loss))(trained), frozen))


def torch_gradient(adapted, config, module, part):
    """That of one module, cut out of those of all experts where PEFT fuses them."""
    parameters = dict(adapted.named_parameters())
    if ".experts." not in module:
        return parameters[f"base_model.model.{module}.lora_{part}.default.weight"].grad.numpy()
    layer, expert, name = re.match(r"model\.layers\.(\d+)\..*\.experts\.(\d+)\.(\w+)$", module).groups()
    kind = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(name, name)
    inside = "" if kind == "down_proj" else ".base_layer"
    key = f"base_model.model.model.layers.{layer}.mlp.experts{inside}.lora_{part}.default.weight"
    value = unflat(part, parameters[key].grad.numpy(), config.experts.count)[int(expert)]
    rank, inner = value.shape[0 if part == "A" else 1], config.experts.intermediate_size
    half = {"gate_proj": 0, "up_proj": 1, "down_proj": None}[kind]
    if half is None:
        return value
    ranks = slice(half * rank // 2, (half + 1) * rank // 2)
    return value[ranks] if part == "A" else value[half * inner : (half + 1) * inner, ranks]


@pytest.mark.parametrize("how", [None, {"quant_method": "awq"}, "nonsense"])
def test_how_weights_are_stored_makes_no_other_decoder(how):
    raw = llama().to_dict()
    assert decoder_config(raw | {"quantization_config": how}) == decoder_config(raw)


ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ({"hidden_size": "abc"}, "'hidden_size' expected int, got str .value: 'abc'"),
        ({"hidden_size": None}, "'hidden_size' expected int"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_key_value_heads": 4}, "num_attention_heads, 6, is not a multiple of num_key_value_heads, 4"),
        ({"vocab_size": -3}, "vocab_size is -3"),
        ({"hidden_act": "tanh"}, "hidden_act 'tanh' is not one of"),
        ({"eos_token_id": "x"}, "'eos_token_id' with value 'x'"),
        ({"dtype": "nonsense"}, "nonsense"),
        ({"rope_parameters": "x"}, "'rope_parameters' with value 'x'"),
        ({"rope_parameters": ROPE | {"rope_type": "spiral"}}, "rope_type 'spiral' is not supported"),
        ({"rope_parameters": ROPE | {"rope_type": ["yarn"]}}, r"rope_type \['yarn'\] is not supported"),
        ({"rope_parameters": {k: v for k, v in ROPE.items() if k != "factor"}}, "'yarn': {'factor'}"),
        ({"rope_parameters": ROPE | {"factor": "4"}}, "factor of the rope must be a positive number, not '4'"),
        ({"rope_parameters": ROPE | {"rope_theta": "x"}}, "rope_theta of the rope must be a positive number, not 'x'"),
        ({"rope_parameters": ROPE | {"rope_theta": None}}, "rope_type yarn needs rope_theta"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": None}}, "linear needs factor"),
        ({"rope_parameters": LONGROPE | {"long_factor": [1, 2]}}, r"long_factor of the rope must be 4 numbers, not \["),
    ],
)
def test_values_that_make_no_decoder(changes, message):
    raw = llama().to_dict() | changes
    with pytest.raises(ValueError, match=rf"(?s)^config\.json: .*{message}") as caught:
        decoder_config(raw)
    assert "\n" not in str(caught.value)
