"""From a config.json to a `DecoderConfig`, by way of transformers' own config classes and their defaults."""

from dataclasses import replace
from typing import Any

from transformers import CONFIG_MAPPING

from jaxft.limits import NoMemoryError, memory_for
from jaxft.models.config import DecoderConfig
from jaxft.models.families import FAMILIES

WITH_VISION = ("gemma3", "internvl", "llava", "mistral3")
"""Vision models whose `text_config` is of one of the families; only their text part is loaded."""

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

    How the weights are stored (`quantization_config`) is ignored.

    Raises:
        ValueError: an unsupported `model_type`, activation or rope type (the message names what is supported); or a
            value that its key does not allow.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in (*FAMILIES, *WITH_VISION):
        raise _unsupported(model_type)
    for key in _SIZES:
        if isinstance(raw.get(key), int) and raw[key] < 1:
            raise ValueError(f"config.json: {key} is {raw[key]}; it must be 1 or more")
    try:
        with memory_for("config.json"):
            hf = CONFIG_MAPPING[model_type].from_dict({k: v for k, v in raw.items() if k != "quantization_config"})
    except NoMemoryError:
        raise
    except Exception as error:  # transformers' checks raise exceptions of many types
        raise ValueError(f"config.json: {_reason(error)}") from error
    if model_type in WITH_VISION:
        tied, hf = hf.tie_word_embeddings, hf.text_config
        hf.tie_word_embeddings = tied
        if hf.model_type not in FAMILIES:
            raise _unsupported(f"{model_type} with the text model {hf.model_type}")
    try:
        config = FAMILIES[hf.model_type](hf)
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"config.json: {_reason(error)}") from error
    return replace(config, part_of=model_type) if model_type in WITH_VISION else config


def _unsupported(model_type: object) -> ValueError:
    return ValueError(
        f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}, and the "
        f"text part of {', '.join(WITH_VISION)}. Families are added in jaxft/models/families.py"
    )


def _reason(error: Exception) -> str:
    """An exception in a line: without the heading that transformers puts above the first cause."""
    first = error.__cause__ or error
    text = str(first.args[0]) if isinstance(first, KeyError) and first.args else str(first)
    return f"{type(first).__name__}: {' '.join(text.split()).partition('. Errors: ')[0]}"
