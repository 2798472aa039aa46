"""Read the settings in `adapter_config.json` that have an effect, in the types that PEFT writes.

A setting that jaxft cannot honour is an error, and so is a value of another type: the text "false" would be true, and
an alpha of Infinity a number. An unknown key is reported.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxft.adapters.targets import LoraConfig
from jaxft.hub.kept import say
from jaxft.hub.model_files import read_json

CONFIG_FILE = "adapter_config.json"

_HARMLESS_INIT = (True, False, None, "gaussian", "orthogonal", "eva")
_UNSUPPORTED = (
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "lora_bias",
    "alora_invocation_tokens",
    "use_qalora",
    "arrow_config",
    "use_bdlora",
)
_ABOUT = {
    *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "inference_mode", "peft_version"),
    *("megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
}
"""Keys that say where an adapter comes from, or how it was trained, and nothing of what it computes."""


def read_adapter_config(directory: Path) -> LoraConfig:
    """The part of adapter_config.json that decides anything.

    Raises:
        ValueError: it cannot be read, cannot be honoured, or holds a value of another type; names the file and the key.
    """
    path = directory / CONFIG_FILE
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {raw.get('peft_type')!r}; only LORA adapters are supported")
    for option in _UNSUPPORTED:
        if raw.get(option):
            raise ValueError(f"{path}: {option}={raw[option]!r} is not supported; merge this adapter with PEFT instead")
    if raw.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias={raw['bias']!r} is not supported: the base's biases stay frozen")
    if raw.get("init_lora_weights", True) not in _HARMLESS_INIT:
        raise ValueError(
            f"{path}: init_lora_weights={raw['init_lora_weights']!r} changes the base's weights; convert the adapter "
            "to plain LoRA first (in PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    for key, (is_one, kind) in _KINDS.items():
        if key in raw and not is_one(raw[key]):
            raise ValueError(f"{path}: {key} is {raw[key]!r}; it must be {kind}")
    if not raw.get("target_modules") and not raw.get("target_parameters"):
        raise ValueError(f"{path}: target_modules is missing")
    known = {"peft_type", "bias", "init_lora_weights", *_KINDS, *_ABOUT, *_UNSUPPORTED}
    if unknown := [key for key in raw if key not in known and raw[key]]:
        say(f"{path}: keys unknown to jaxft have no effect: {', '.join(sorted(unknown))}")
    return LoraConfig(
        r=raw.get("r", 8),
        lora_alpha=raw.get("lora_alpha", 8),
        target_modules=raw.get("target_modules") or [],
        target_parameters=raw.get("target_parameters") or [],
        exclude_modules=raw.get("exclude_modules"),
        layers_to_transform=_as_list(raw.get("layers_to_transform")),
        layers_pattern=_as_list(raw.get("layers_pattern")),
        lora_dropout=raw.get("lora_dropout") or 0.0,
        use_rslora=bool(raw.get("use_rslora")),
        use_dora=bool(raw.get("use_dora")),
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
    )


def _as_list(value: Any) -> list | None:
    return value if value is None or isinstance(value, list) else [value]


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _or_null(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or kind(value)


def _list_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(kind, value))


def _one_or_list(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or kind(value) or _list_of(kind)(value)


def _by_pattern(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(kind, value.values())))


_FLAG = (_or_null(lambda value: isinstance(value, bool)), "true or false")
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number, 1 or more"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (_or_null(lambda value: _is_number(value) and 0 <= value < 1), "a number from 0 to below 1"),
    "target_modules": (_one_or_list(_is_text), "a list of names, or one regular expression"),
    "exclude_modules": (_one_or_list(_is_text), "a list of names, or one regular expression"),
    "target_parameters": (_or_null(_list_of(_is_text)), "a list of names"),
    "layers_to_transform": (_one_or_list(_is_whole), "a layer's number, or a list of them"),
    "layers_pattern": (_one_or_list(_is_text), "a name, or a list of names"),
    "rank_pattern": (_by_pattern(_is_rank), "an object of patterns and whole numbers, 1 or more"),
    "alpha_pattern": (_by_pattern(_is_number), "an object of patterns and numbers"),
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "fan_in_fan_out": _FLAG,
}
"""Keys that decide what an adapter computes: what they may hold, in a test and in words."""
