"""The fields of config.json that nearly all families share."""

from functools import partial
from typing import Any, Literal

from transformers import PreTrainedConfig

from jaxft.models.config import DecoderConfig, LayerSpec
from jaxft.models.rope_config import parse_rope

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def shared(
    hf: PreTrainedConfig,
    *,
    layers: tuple[LayerSpec, ...] | None = None,
    norm_eps: float | None = None,
    interleaved: bool = False,
    **more: Any,
) -> DecoderConfig:
    """A `DecoderConfig` from the fields that nearly all families share, and from `more`."""
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


def biases(hf: PreTrainedConfig, key: str = "attention_bias") -> dict[str, bool]:
    return {"qkv_bias": getattr(hf, key), "o_bias": getattr(hf, key)}


def typed_layers(hf: PreTrainedConfig, sliding_rope: Literal["global", "local"] = "global") -> tuple[LayerSpec, ...]:
    """Layers by `layer_types`: sliding ones have a window and, in some families, their own rotary embedding."""
    sliding = LayerSpec(hf.sliding_window, sliding_rope)
    return tuple(sliding if kind == "sliding_attention" else LayerSpec() for kind in hf.layer_types)
