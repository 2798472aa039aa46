"""Finds keys of a config that contradict each other, and keys that have no effect.

`contradictions` are errors. `idle` are keys that this run never looks at, such as `lora_r` where every weight is
trained. One with a value of its own asks for what it does not get, and is a contradiction; one that only bounds or
weighs what does not happen (`_TOLD`) is told of, as is one that is given with the value it has anyway. A written
config leaves idle keys out, so that all it says holds.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

Config = Any
"""A `jaxft.config.Config`, which asks these rules when it is made, and so stands above them."""

OF_A_NEW_ADAPTER = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_parameters",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
)
_OF_THE_ADAPTER = ("adapter", "use_dora", *OF_A_NEW_ADAPTER)
_WITH_HELD_OUT = (
    "early_stopping_patience",
    "exact_match_samples",
    "eval_steps",
    "load_best_model_at_end",
    "sample_prompts",
)
_TOLD = ("load_best_model_at_end", "max_new_tokens", "num_train_epochs", "sample_prompts")
MAY_BE_IDLE = {*_OF_THE_ADAPTER, *_WITH_HELD_OUT, "quant_group_size", "num_train_epochs", "max_new_tokens"}
"""What a written config may leave out."""


class Idle(NamedTuple):
    """A key without effect: why, in words that follow its name, and whether its value asks for something."""

    key: str
    why: str
    asks: bool


def contradictions(config: Config) -> Iterator[str]:
    """The contradictions, a line for each; keys stand in backticks."""
    load_in = (config.load_in_4bit, config.load_in_8bit)
    if all(load_in):
        yield "`load_in_4bit` and `load_in_8bit` are both true; keep one"
    elif load_in != (config.quant_type in ("nf4", "int4"), config.quant_type == "int8"):
        flags = "`load_in_4bit` is {} and `load_in_8bit` is {}".format(*(str(x).lower() for x in load_in))
        yield f"`quant_type` is {config.quant_type}, but {flags}; keep one"
    if config.use_double_quant and config.quant_type != "nf4":
        yield "`use_double_quant` belongs to nf4; set `quant_type` to nf4 or drop it"
    if config.use_dora != (config.adapter == "dora"):
        yield f"`use_dora` is {str(config.use_dora).lower()}, but `adapter` is {config.adapter}; keep one"
    if config.adapter == "none" and config.quant_type is not None:
        yield "`adapter` is none, but quantized weights cannot be trained; use lora or do not quantize"
    if config.adapter == "none" and config.adapter_name_or_path is not None:
        yield "`adapter` is none, so nothing can go on from `adapter_name_or_path`; drop one of them"
    if "activations" in config.offload and config.remat == "none":
        yield "`offload` has activations, but `remat` is none; set it to full, dots or a list of names"
    if "lora" in config.remat and config.adapter == "none":
        yield "`remat` keeps lora, but `adapter` is none, so there is no adapter; take it out of the list"
    if config.eval_datasets and config.val_set_size:
        yield "`eval_datasets` and `val_set_size` are both given; keep one"
    for place, dataset in enumerate(config.eval_datasets):
        if dataset.weight is not None:
            yield f"`weight` of eval_datasets.{place} has no effect, every held-out example counts once; drop it"
    if config.mask_history and not config.assistant_only_loss:
        yield "`mask_history` learns the last answer only, but `assistant_only_loss` is false: all tokens; keep one"
    if config.warmup_ratio and config.warmup_steps:
        yield "`warmup_ratio` and `warmup_steps` are both given; keep one"
    for key, why, asks in idle(config):
        if key == "adapter" and asks:
            yield "`adapter` and `use_dora` are those of the adapter in `adapter_name_or_path`; drop them"
        elif key != "use_dora" and asks:
            yield f"`{key}` {why}"


def idle(config: Config) -> Iterator[Idle]:
    """The keys that this run never looks at."""
    for key, why in _idle(config):
        field = type(config).model_fields[key]
        yield Idle(key, why, key not in _TOLD and getattr(config, key) != field.default)


def _idle(config: Config) -> Iterator[tuple[str, str]]:
    if config.adapter == "none":
        for key in OF_A_NEW_ADAPTER:
            yield key, "is that of an adapter, but `adapter` is none; drop one of them"
    elif config.adapter_name_or_path is not None:
        for key in _OF_THE_ADAPTER:
            yield key, "is that of the adapter in `adapter_name_or_path`; drop one of them"
    if config.quant_type != "int4":
        yield "quant_group_size", "belongs to int4; set `quant_type` to int4 or drop it"
    if config.max_steps is not None:
        yield "num_train_epochs", "has no effect beside `max_steps`"
    held_out = bool(config.eval_datasets or config.val_set_size)
    if not held_out:
        for key in _WITH_HELD_OUT:
            yield key, "needs held-out examples; give `eval_datasets` or `val_set_size`"
    if not (held_out and (config.sample_prompts or config.exact_match_samples)):
        yield "max_new_tokens", "has no effect, as the model is asked nothing"
