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
    if (quantized := raw.get("quantization_config")) is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ValueError(
            f"config.json: this checkpoint is already quantized (quant_method {method!r}); "
            "give the full-precision checkpoint, and load_in_4bit or load_in_8bit to quantize while loading"
        )
    for key in _SIZES:
        if isinstance(raw.get(key), int) and raw[key] < 1:
            raise ValueError(f"config.json: {key} is {raw[key]}; it must be 1 or more")
    try:
        hf = CONFIG_MAPPING[model_type].from_dict(dict(raw))
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
    if hf.num_attention_heads % hf.num_key_value_heads:
        raise ValueError(
            f"config.json: num_attention_heads, {hf.num_attention_heads}, is not a multiple of "
            f"num_key_value_heads, {hf.num_key_value_heads}"
        )
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


_ORIGINAL = "original_max_position_embeddings"
_ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # those it needs, those it may have
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL), ()),
    "yarn": (
        (_ORIGINAL,),
        ("factor", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"),
    ),
    "longrope": (("long_factor", "short_factor", _ORIGINAL), ("factor", "attention_factor")),
}


def _rope(hf: PreTrainedConfig, head_dim: int) -> Rope:
    given = {key: value for key, value in hf.rope_parameters.items() if value is not None}
    kind = given.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise ValueError(f"config.json: rope_type {kind!r} is not supported; supported: {', '.join(_ROPE_KEYS)}")
    needed, optional = _ROPE_KEYS[kind]
    for key in ("rope_theta", *needed):
        if key not in given:
            raise ValueError(f"config.json: rope_type {kind} needs {key}")
    kept = {key: given[key] for key in needed + optional if key in given}
    for key, value in {"rope_theta": given["rope_theta"], **kept}.items():
        if key in ("long_factor", "short_factor"):
            if not isinstance(value, list) or len(value) != head_dim // 2 or not all(map(_is_number, value)):
                raise ValueError(f"config.json: {key} of the rope must be {head_dim // 2} numbers, not {value!r}")
        elif not _is_number(value) or (key in ("rope_theta", "factor") and value <= 0):
            raise ValueError(f"config.json: {key} of the rope must be a positive number, not {value!r}")
    frozen = tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in kept.items())
    return Rope(float(given["rope_theta"]), head_dim, hf.max_position_embeddings, kind, frozen)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
