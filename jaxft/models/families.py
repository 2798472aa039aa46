"""The families: each has a function from transformers' config to a `DecoderConfig`. Its docstring names checkpoints."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from jaxft.models.config import BlockNorms, Clamp, DecoderConfig, Experts, LayerSpec
from jaxft.models.family_fields import biases, shared, typed_layers

TRANSPOSED = ("gpt2",)
"""Families whose checkpoints store the layers' projections as [in, out]."""


def _llama(hf: PreTrainedConfig) -> DecoderConfig:
    """Llama 1, 2, 3, 3.1, 3.2 (text), 3.3, TinyLlama, SmolLM, SmolLM2, Yi, DeepSeek-R1-Distill-Llama."""
    return shared(hf, **biases(hf), mlp_bias=hf.mlp_bias)


def _mistral(hf: PreTrainedConfig) -> DecoderConfig:
    """Mistral 7B, Nemo, Small, Zephyr."""
    return shared(hf, layers=(LayerSpec(hf.sliding_window),) * hf.num_hidden_layers)


def _qwen2(hf: PreTrainedConfig) -> DecoderConfig:
    """Qwen1.5, Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen, QwQ."""
    return shared(hf, qkv_bias=True, layers=typed_layers(hf))


def _qwen3(hf: PreTrainedConfig) -> DecoderConfig:
    """Qwen3 0.6B to 32B."""
    return shared(hf, **biases(hf), qk_norm="head", layers=typed_layers(hf))


def _smollm3(hf: PreTrainedConfig) -> DecoderConfig:
    """SmolLM3."""
    layers = tuple(
        replace(spec, rope="global" if turns else None)
        for spec, turns in zip(typed_layers(hf), hf.no_rope_layers, strict=True)
    )
    return shared(hf, **biases(hf), mlp_bias=hf.mlp_bias, layers=layers)


def _gemma(hf: PreTrainedConfig, **more: Any) -> DecoderConfig:
    """Gemma, CodeGemma."""
    return shared(hf, **biases(hf), norm="rms_offset", embedding_scale=hf.hidden_size**0.5, **more)


_SANDWICH = BlockNorms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)


def _gemma2(hf: PreTrainedConfig, **more: Any) -> DecoderConfig:
    """Gemma 2."""
    return _gemma(
        hf,
        block_norms=_SANDWICH,
        attention_scale=hf.query_pre_attn_scalar**-0.5,
        logits_softcap=hf.final_logit_softcapping,
        **{"layers": typed_layers(hf), "attention_softcap": hf.attn_logit_softcapping} | more,
    )


def _gemma3(hf: PreTrainedConfig) -> DecoderConfig:
    """Gemma 3 1B, and the text part of the larger ones."""
    if hf.use_bidirectional_attention:
        raise ValueError("config.json: use_bidirectional_attention is set; only causal models can be trained")
    # Its config has an attention softcap too, but no code applies it.
    layers = typed_layers(hf, sliding_rope="local")
    return _gemma2(hf, qk_norm="head", layers=layers, attention_softcap=None)


def _granite(hf: PreTrainedConfig) -> DecoderConfig:
    """Granite 3.0 to 3.3, dense."""
    return shared(
        hf,
        **biases(hf),
        mlp_bias=hf.mlp_bias,
        attention_scale=float(hf.attention_multiplier),
        embedding_scale=float(hf.embedding_multiplier),
        residual_scale=float(hf.residual_multiplier),
        logits_scale=1 / hf.logits_scaling,
    )


def _olmo2(hf: PreTrainedConfig, **more: Any) -> DecoderConfig:
    """OLMo 2."""
    after = BlockNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
    return shared(hf, **biases(hf), qk_norm="projection", block_norms=after, **more)


def _olmo3(hf: PreTrainedConfig) -> DecoderConfig:
    """OLMo 3."""
    return _olmo2(hf, layers=typed_layers(hf, sliding_rope="local"))


def _cohere2(hf: PreTrainedConfig) -> DecoderConfig:
    """Command R7B, Command A, Aya."""
    layers = tuple(replace(spec, rope=spec.window and "global") for spec in typed_layers(hf))
    return shared(
        hf,
        **biases(hf),
        norm="layer",
        norm_eps=hf.layer_norm_eps,
        block_norms=BlockNorms("input_layernorm", None, None, None),
        parallel=True,
        logits_scale=hf.logit_scale,
        interleaved=True,
        layers=layers,
    )


def _glm(hf: PreTrainedConfig) -> DecoderConfig:
    """GLM-4-9B (-hf), GLM-Edge."""
    return shared(hf, qkv_bias=hf.attention_bias, fused_gate_up=True, interleaved=True)


def _glm4(hf: PreTrainedConfig) -> DecoderConfig:
    """GLM-4-0414."""
    norms = BlockNorms("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
    return shared(hf, qkv_bias=hf.attention_bias, block_norms=norms, fused_gate_up=True, interleaved=True)


def _phi3(hf: PreTrainedConfig) -> DecoderConfig:
    """Phi-3, Phi-3.5, Phi-4, dense."""
    layers = (LayerSpec(hf.sliding_window),) * hf.num_hidden_layers
    return shared(hf, fused_qkv="in turn", fused_gate_up=True, layers=layers)


def _starcoder2(hf: PreTrainedConfig) -> DecoderConfig:
    """StarCoder2."""
    return shared(
        hf,
        **biases(hf, "use_bias"),
        mlp_bias=hf.use_bias,
        norm="layer_bias",
        norm_eps=hf.norm_epsilon,
        gated_mlp=False,
        layers=(LayerSpec(hf.sliding_window),) * hf.num_hidden_layers,
        renames=(("mlp.up_proj", "mlp.c_fc"), ("mlp.down_proj", "mlp.c_proj")),
    )


def _gpt2(hf: PreTrainedConfig) -> DecoderConfig:
    """GPT-2, DistilGPT-2."""
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if getattr(hf, key):
            raise ValueError(f"config.json: {key} is set, which is not supported for gpt2")
    hf.hidden_act = hf.activation_function
    hf.intermediate_size = hf.n_inner or 4 * hf.hidden_size
    hf.rope_parameters = {"rope_theta": 1.0}  # not used; positions are learned
    return shared(
        hf,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        norm="layer_bias",
        norm_eps=hf.layer_norm_epsilon,
        attention_scale=None if hf.scale_attn_weights else 1.0,
        fused_qkv="in turn",
        gated_mlp=False,
        layers=(LayerSpec(rope=None),) * hf.num_hidden_layers,
        learned_positions=hf.max_position_embeddings,
        transposed=hf.model_type in TRANSPOSED,
        renames=(
            ("model.embed_tokens", "transformer.wte"),
            ("model.embed_positions", "transformer.wpe"),
            ("model.layers", "transformer.h"),
            ("model.norm", "transformer.ln_f"),
            ("input_layernorm", "ln_1"),
            ("post_attention_layernorm", "ln_2"),
            ("self_attn.qkv_proj", "attn.c_attn"),
            ("self_attn.o_proj", "attn.c_proj"),
            ("mlp.up_proj", "mlp.c_fc"),
            ("mlp.down_proj", "mlp.c_proj"),
        ),
    )


def _gpt_neox(hf: PreTrainedConfig) -> DecoderConfig:
    """GPT-NeoX, Pythia."""
    return shared(
        hf,
        **biases(hf),
        mlp_bias=True,
        norm="layer_bias",
        norm_eps=hf.layer_norm_eps,
        parallel=hf.use_parallel_residual,
        fused_qkv="by head",
        gated_mlp=False,
        renames=(
            ("model.embed_tokens", "gpt_neox.embed_in"),
            ("model.layers", "gpt_neox.layers"),
            ("model.norm", "gpt_neox.final_layer_norm"),
            ("self_attn.qkv_proj", "attention.query_key_value"),
            ("self_attn.o_proj", "attention.dense"),
            ("mlp.up_proj", "mlp.dense_h_to_4h"),
            ("mlp.down_proj", "mlp.dense_4h_to_h"),
            ("lm_head.weight", "embed_out.weight"),
        ),
    )


def _some_sparse(hf: PreTrainedConfig, layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
    """The layers, with `sparse` set on each `decoder_sparse_step`-th one that is not in `mlp_only_layers`."""

    def is_sparse(layer: int) -> bool:
        return layer not in hf.mlp_only_layers and (layer + 1) % hf.decoder_sparse_step == 0

    return tuple(replace(spec, sparse=is_sparse(layer)) for layer, spec in enumerate(layers))


def _qwen_experts(hf: PreTrainedConfig, **more: Any) -> Experts:
    sizes = hf.num_experts, hf.num_experts_per_tok, hf.moe_intermediate_size
    return Experts(*sizes, normalized=hf.norm_topk_prob, **more)


def _qwen2_moe(hf: PreTrainedConfig) -> DecoderConfig:
    """Qwen1.5-MoE, Qwen2-57B-A14B."""
    # PEFT silently drops adapters on these experts.
    experts = _qwen_experts(hf, shared_size=hf.shared_expert_intermediate_size, adapters=None)
    layers = _some_sparse(hf, typed_layers(hf))
    return shared(hf, qkv_bias=hf.qkv_bias, layers=layers, experts=experts, renames=_QWEN_ROUTER)


def _qwen3_moe(hf: PreTrainedConfig) -> DecoderConfig:
    """Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder."""
    layers = _some_sparse(hf, (LayerSpec(hf.sliding_window),) * hf.num_hidden_layers)
    more = dict(layers=layers, experts=_qwen_experts(hf), renames=_QWEN_ROUTER)
    return shared(hf, **biases(hf), qk_norm="head", **more)


_QWEN_ROUTER = (("mlp.router", "mlp.gate"),)


def _mixtral(hf: PreTrainedConfig) -> DecoderConfig:
    """Mixtral 8x7B, 8x22B."""
    return shared(
        hf,
        layers=(LayerSpec(hf.sliding_window, sparse=True),) * hf.num_hidden_layers,
        experts=Experts(hf.num_local_experts, hf.num_experts_per_tok, hf.intermediate_size),
        renames=(
            ("mlp.router", "block_sparse_moe.gate"),
            ("mlp.experts", "block_sparse_moe.experts"),
            ("experts.%.gate_proj", "experts.%.w1"),
            ("experts.%.down_proj", "experts.%.w2"),
            ("experts.%.up_proj", "experts.%.w3"),
        ),
    )


def _gpt_oss(hf: PreTrainedConfig) -> DecoderConfig:
    """gpt-oss-20b, gpt-oss-120b."""
    return shared(
        hf,
        **biases(hf),
        attention_sinks=True,
        layers=tuple(replace(spec, sparse=True) for spec in typed_layers(hf)),
        experts=Experts(
            hf.num_local_experts,
            hf.num_experts_per_tok,
            hf.intermediate_size,
            router_bias=True,
            bias=True,
            clamp=Clamp(hf.swiglu_alpha, hf.swiglu_limit),
            fused=True,
            transposed=True,
            adapters="target_parameters",
        ),
        renames=tuple(
            (f"experts.{name}_proj.{ours}", f"experts.{name}_proj{theirs}")
            for name in ("gate_up", "down")
            for ours, theirs in (("weight", ""), ("bias", "_bias"))
        ),
    )


FAMILIES: dict[str, Callable[[PreTrainedConfig], DecoderConfig]] = {
    "cohere2": _cohere2,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "glm": _glm,
    "glm4": _glm4,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "gpt_oss": _gpt_oss,
    "granite": _granite,
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "olmo2": _olmo2,
    "olmo3": _olmo3,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "smollm3": _smollm3,
    "starcoder2": _starcoder2,
}
