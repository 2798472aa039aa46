"""From a Hugging Face config.json to a `DecoderConfig`. A family is one function here."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from transformers import CONFIG_MAPPING, PreTrainedConfig

from jaxft.models.config import BlockNorms, DecoderConfig, LayerSpec
from jaxft.models.rope_config import parse_rope

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def decoder_config(raw: dict[str, Any]) -> DecoderConfig:
    """The decoder that a config.json describes. Fields it leaves out take transformers' defaults.

    How the weights are stored (`quantization_config`) makes no difference to it.

    Raises:
        ValueError: an unsupported `model_type`, activation or rope type, where the message names what is
            supported; or a value that is not what its key asks for.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}. "
            f"Families are added in {__name__.replace('.', '/')}.py"
        )
    for key in _SIZES:
        if isinstance(raw.get(key), int) and raw[key] < 1:
            raise ValueError(f"config.json: {key} is {raw[key]}; it must be 1 or more")
    try:
        hf = CONFIG_MAPPING[model_type].from_dict({k: v for k, v in raw.items() if k != "quantization_config"})
    except Exception as error:  # every check of transformers has an exception of its own
        raise ValueError(f"config.json: {_reason(error)}") from error
    try:
        return FAMILIES[model_type](hf)
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"config.json: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """An exception in a line: without the heading that transformers puts above the first cause."""
    first = error.__cause__ or error
    text = str(first.args[0]) if isinstance(first, KeyError) and first.args else str(first)
    return f"{type(first).__name__}: {' '.join(text.split()).partition('. Errors: ')[0]}"


def _llama(hf: PreTrainedConfig) -> DecoderConfig:
    return _shared(hf, **_biases(hf), mlp_bias=hf.mlp_bias)


def _mistral(hf: PreTrainedConfig) -> DecoderConfig:
    return _shared(hf, layers=(LayerSpec(hf.sliding_window),) * hf.num_hidden_layers)


def _qwen2(hf: PreTrainedConfig) -> DecoderConfig:
    return _shared(hf, qkv_bias=True, layers=_typed_layers(hf))


def _qwen3(hf: PreTrainedConfig) -> DecoderConfig:
    return _shared(hf, **_biases(hf), qk_norm="head", layers=_typed_layers(hf))


def _smollm3(hf: PreTrainedConfig) -> DecoderConfig:
    layers = tuple(
        replace(spec, rope="global" if turns else None)
        for spec, turns in zip(_typed_layers(hf), hf.no_rope_layers, strict=True)
    )
    return _shared(hf, **_biases(hf), mlp_bias=hf.mlp_bias, layers=layers)


def _gemma(hf: PreTrainedConfig, **more: Any) -> DecoderConfig:
    return _shared(hf, **_biases(hf), norm="rms_offset", embedding_scale=hf.hidden_size**0.5, **more)


_SANDWICH = BlockNorms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)


def _gemma2(hf: PreTrainedConfig, **more: Any) -> DecoderConfig:
    return _gemma(
        hf,
        block_norms=_SANDWICH,
        attention_scale=hf.query_pre_attn_scalar**-0.5,
        logits_softcap=hf.final_logit_softcapping,
        **{"layers": _typed_layers(hf), "attention_softcap": hf.attn_logit_softcapping} | more,
    )


def _gemma3(hf: PreTrainedConfig) -> DecoderConfig:
    if hf.use_bidirectional_attention:
        raise ValueError("config.json: use_bidirectional_attention is set; only causal models can be trained")
    # Its config has an attention softcap, too, but no code that applies it.
    layers = _typed_layers(hf, sliding_rope="local")
    return _gemma2(hf, qk_norm="head", layers=layers, attention_softcap=None)


def _granite(hf: PreTrainedConfig) -> DecoderConfig:
    return _shared(
        hf,
        **_biases(hf),
        mlp_bias=hf.mlp_bias,
        attention_scale=float(hf.attention_multiplier),
        embedding_scale=float(hf.embedding_multiplier),
        residual_scale=float(hf.residual_multiplier),
        logits_scale=1 / hf.logits_scaling,
    )


def _olmo2(hf: PreTrainedConfig, **more: Any) -> DecoderConfig:
    after = BlockNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
    return _shared(hf, **_biases(hf), qk_norm="projection", block_norms=after, **more)


def _olmo3(hf: PreTrainedConfig) -> DecoderConfig:
    return _olmo2(hf, layers=_typed_layers(hf, sliding_rope="local"))


def _cohere2(hf: PreTrainedConfig) -> DecoderConfig:
    layers = tuple(replace(spec, rope=spec.window and "global") for spec in _typed_layers(hf))
    return _shared(
        hf,
        **_biases(hf),
        norm="layer",
        norm_eps=hf.layer_norm_eps,
        block_norms=BlockNorms("input_layernorm", None, None, None),
        parallel=True,
        logits_scale=hf.logit_scale,
        interleaved=True,
        layers=layers,
    )


def _glm4(hf: PreTrainedConfig) -> DecoderConfig:
    norms = BlockNorms("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
    return _shared(hf, qkv_bias=hf.attention_bias, block_norms=norms, fused_gate_up=True, interleaved=True)


def _phi3(hf: PreTrainedConfig) -> DecoderConfig:
    layers = (LayerSpec(hf.sliding_window),) * hf.num_hidden_layers
    return _shared(hf, fused_qkv="in turn", fused_gate_up=True, layers=layers)


def _starcoder2(hf: PreTrainedConfig) -> DecoderConfig:
    return _shared(
        hf,
        **_biases(hf, "use_bias"),
        mlp_bias=hf.use_bias,
        norm="layer_bias",
        norm_eps=hf.norm_epsilon,
        gated_mlp=False,
        layers=(LayerSpec(hf.sliding_window),) * hf.num_hidden_layers,
        renames=(("mlp.up_proj", "mlp.c_fc"), ("mlp.down_proj", "mlp.c_proj")),
    )


def _gpt2(hf: PreTrainedConfig) -> DecoderConfig:
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if getattr(hf, key):
            raise ValueError(f"config.json: {key} is set, which is not supported for gpt2")
    hf.hidden_act = hf.activation_function
    hf.intermediate_size = hf.n_inner or 4 * hf.hidden_size
    hf.rope_parameters = {"rope_theta": 1.0}  # there is none; positions are learned
    return _shared(
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
        transposed=True,
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
    return _shared(
        hf,
        **_biases(hf),
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


FAMILIES: dict[str, Callable[[PreTrainedConfig], DecoderConfig]] = {
    "cohere2": _cohere2,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "glm4": _glm4,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "granite": _granite,
    "llama": _llama,
    "mistral": _mistral,
    "olmo2": _olmo2,
    "olmo3": _olmo3,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
    "starcoder2": _starcoder2,
}


def _shared(
    hf: PreTrainedConfig,
    *,
    layers: tuple[LayerSpec, ...] | None = None,
    norm_eps: float | None = None,
    interleaved: bool = False,
    **more: Any,
) -> DecoderConfig:
    """What nearly all families name alike, and `more` fields of `DecoderConfig`."""
    activation = getattr(hf, "hidden_activation", None) or hf.hidden_act
    if activation not in _ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act {activation!r} is not one of {', '.join(_ACTIVATIONS)}")
    kv_heads = getattr(hf, "num_key_value_heads", hf.num_attention_heads)
    if hf.num_attention_heads % kv_heads:
        raise ValueError(
            f"config.json: num_attention_heads, {hf.num_attention_heads}, is not a multiple of "
            f"num_key_value_heads, {kv_heads}"
        )
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    by_type = "full_attention" in hf.rope_parameters
    rope = partial(parse_rope, head_dim=head_dim, max_positions=hf.max_position_embeddings, interleaved=interleaved)
    return DecoderConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_heads=hf.num_attention_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        layers=layers or (LayerSpec(),) * hf.num_hidden_layers,
        rope=rope(hf.rope_parameters["full_attention"] if by_type else hf.rope_parameters),
        local_rope=rope(hf.rope_parameters["sliding_attention"]) if by_type else None,
        norm_eps=hf.rms_norm_eps if norm_eps is None else norm_eps,
        activation=_ACTIVATIONS[activation],
        tie_word_embeddings=hf.tie_word_embeddings,
        **more,
    )


def _biases(hf: PreTrainedConfig, key: str = "attention_bias") -> dict[str, bool]:
    return {"qkv_bias": getattr(hf, key), "o_bias": getattr(hf, key)}


def _typed_layers(hf: PreTrainedConfig, sliding_rope: Literal["global", "local"] = "global") -> tuple[LayerSpec, ...]:
    """Layers of `layer_types`: those that slide have a window, and in some families a rotary embedding of their own."""
    sliding = LayerSpec(hf.sliding_window, sliding_rope)
    return tuple(sliding if kind == "sliding_attention" else LayerSpec() for kind in hf.layer_types)
