"""From a Hugging Face config.json to a `DecoderConfig`. A family is one function here."""

from collections.abc import Callable
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from jaxft.models.config import DecoderConfig, LayerSpec, Rope

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def decoder_config(raw: dict[str, Any]) -> DecoderConfig:
    """The decoder that a config.json describes. Fields it leaves out take transformers' defaults.

    Raises:
        ValueError: an unsupported `model_type`, activation or rope type; the message names what is supported.
    """
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}. "
            f"Families are added in {__name__.replace('.', '/')}.py"
        )
    if "quantization_config" in raw:
        method = raw["quantization_config"].get("quant_method")
        raise ValueError(
            f"config.json: this checkpoint is already quantized (quant_method {method!r}); "
            "give the full-precision checkpoint, and load_in_4bit or load_in_8bit to quantize while loading"
        )
    return FAMILIES[model_type](CONFIG_MAPPING[model_type].from_dict(dict(raw)))


def _llama(hf: PreTrainedConfig) -> DecoderConfig:
    bias = hf.attention_bias
    return _shared(hf, qkv_bias=bias, o_bias=bias, mlp_bias=hf.mlp_bias)


def _mistral(hf: PreTrainedConfig) -> DecoderConfig:
    return _shared(hf, windows=[hf.sliding_window] * hf.num_hidden_layers)


def _qwen2(hf: PreTrainedConfig) -> DecoderConfig:
    return _shared(hf, qkv_bias=True, windows=_typed_windows(hf))


def _qwen3(hf: PreTrainedConfig) -> DecoderConfig:
    bias = hf.attention_bias
    return _shared(hf, qkv_bias=bias, o_bias=bias, qk_norm=True, windows=_typed_windows(hf))


FAMILIES: dict[str, Callable[[PreTrainedConfig], DecoderConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}


def _shared(hf: PreTrainedConfig, *, windows: list[int | None] | None = None, **switches: bool) -> DecoderConfig:
    if hf.hidden_act not in _ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act {hf.hidden_act!r} is not one of {', '.join(_ACTIVATIONS)}")
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    return DecoderConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        layers=tuple(LayerSpec(window) for window in windows or [None] * hf.num_hidden_layers),
        rope=_rope(hf, head_dim),
        norm_eps=hf.rms_norm_eps,
        activation=_ACTIVATIONS[hf.hidden_act],
        tie_word_embeddings=hf.tie_word_embeddings,
        **switches,
    )


def _typed_windows(hf: PreTrainedConfig) -> list[int | None]:
    return [hf.sliding_window if kind == "sliding_attention" else None for kind in hf.layer_types]


_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "beta_fast",
        "beta_slow",
        "truncate",
        "original_max_position_embeddings",
    ),
    "longrope": (
        "factor",
        "attention_factor",
        "long_factor",
        "short_factor",
        "original_max_position_embeddings",
    ),
}


def _rope(hf: PreTrainedConfig, head_dim: int) -> Rope:
    parameters = dict(hf.rope_parameters)
    kind = parameters.get("rope_type", "default")
    if kind not in _ROPE_KEYS:
        raise ValueError(f"config.json: rope_type {kind!r} is not supported; supported: {', '.join(_ROPE_KEYS)}")
    kept = {key: parameters[key] for key in _ROPE_KEYS[kind] if key in parameters}
    frozen = tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in kept.items())
    return Rope(float(parameters["rope_theta"]), head_dim, hf.max_position_embeddings, kind, frozen)
