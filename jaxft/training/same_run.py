"""Whether a resumed run is the run that was started: what may change in between, and what is said of it.

`run.json` holds fingerprints of what decides the result besides the config (data, tokenizer, base, rows of an update,
...) and what may explain a difference in the last bits (versions, devices). Everything else is in `config.yaml`.
"""

import importlib.metadata
import logging
import math
import platform
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import yaml

from jaxft.config_rules import MAY_BE_IDLE

logger = logging.getLogger(__name__)

FREE_KEYS = {
    "output_dir",
    "resume_from_checkpoint",
    "logging_steps",
    "report_to",
    "save_steps",
    "save_total_limit",
    "max_nonfinite_steps",
    "load_best_model_at_end",
    "exact_match_samples",
    "sample_prompts",
    "max_new_tokens",
}
"""Config keys that a resumed run may change: they decide what is reported, kept and exported, never what is learned."""

LENGTH_KEYS = {"num_train_epochs", "max_steps"}
"""May change, too: the run gets longer or shorter, and the learning rate takes another way (`Config` has its form)."""

ROUNDING_KEYS = {
    "attn_implementation",
    "gradient_accumulation_steps",
    "mesh",
    "micro_batch_size",
    "offload",
    "remat",
    "scan_layers",
}
"""May change, too: the same sums in another order, while the rows of an update are as many as they were (there is a
fingerprint of them). The result is equal up to rounding; the log says so."""

PLACES = re.compile(r"model_(name_or_path|revision)|adapter_name_or_path|chat_template|(eval_)?datasets\.\d+\.path")
"""Keys that say where something lies. May change, too, while no fingerprint does: a run moves to another machine."""

ROWS = "rows of an update"
"""The fingerprint that `ROUNDING_KEYS` must leave as it was."""

_PACKAGES = ("jaxft", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def compare(
    recorded: Mapping[str, Any], config_before: str | bytes, config_yaml: str, fingerprints: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """What forbids to go on with a run, and what is worth a warning; a line for each.

    Args:
        recorded: what `run.json` holds.
        config_before: `config.yaml` of the run.
        config_yaml: the config that it is to go on with.
        fingerprints: what decides the result besides the config, name -> digest.

    Raises:
        ValueError: `config_before` is no config.
    """
    before, after = _read(config_before), _read(config_yaml)
    refused, told = [], []
    for name, old, new in _changes(recorded["fingerprints"], fingerprints):
        refused.append(f"the {name} changed: {old} -> {new}")
        if name == ROWS and str(old).isdecimal() and new.isdecimal():
            refused[-1] += f"; {_rows_that_fit(int(old), int(new), after)}"
    contents_changed = bool(refused)
    for key, old, new in _changes(before, after):
        section = key.partition(".")[0]
        if section in MAY_BE_IDLE and not (section in before and section in after):
            continue  # it had no effect on one side; what gave it one has changed, too, and is in both
        if section in ROUNDING_KEYS:
            told.append(f"resumed with another {key} ({old} -> {new}): equal up to rounding")
        elif PLACES.fullmatch(key) and "nothing" not in (old, new) and not contents_changed:
            told.append(f"resumed with another {key} ({old} -> {new}): what lies there is the same")
        elif section not in FREE_KEYS | LENGTH_KEYS:
            refused.append(f"{key}: {old} -> {new}")
    for name, old, new in _changes({k: recorded[k] for k in ("versions", "devices")}, environment()):
        told.append(f"resumed with another {name} ({old} -> {new}): the last bits may differ")
    return refused, told


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a run computes."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def environment() -> dict[str, Any]:
    """What may explain a difference in the last bits."""
    devices = jax.devices()
    return {
        "versions": versions(),
        "devices": {"kind": devices[0].device_kind, "count": len(devices)},
    }


def _read(text: str | bytes) -> dict[str, Any]:
    try:
        config = yaml.load(text, yaml.BaseLoader)  # every scalar as it is written
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    if not isinstance(config, dict):
        raise ValueError("it is empty" if config in (None, "") else "it is not a mapping")
    return config


def _rows_that_fit(old: int, new: int, config: Mapping[str, Any]) -> str:
    """What makes the rows of an update as many as they were, on the devices that there are now."""
    micro = int(config["micro_batch_size"])
    ways = new // (micro * int(config["gradient_accumulation_steps"]))
    if old % ways:
        return f"{old} rows cannot be shared out among {ways} groups (data x fsdp x expert): take another mesh"
    fitting = math.gcd(micro, old // ways)
    return (
        f"{old} rows on {ways} groups (data x fsdp x expert) are micro_batch_size: {fitting} with "
        f"gradient_accumulation_steps: {old // ways // fitting}, or another pair whose product is {old // ways}"
    )


def _changes(before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old, new) wherever the two differ; what is on one side only is `nothing` on the other."""
    old, new = dict(_flat(before)), dict(_flat(after))
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            yield key, old.get(key, "nothing"), new.get(key, "nothing")


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    parts = dict(enumerate(value)) if isinstance(value, list) else value
    if not (isinstance(parts, dict) and parts):
        yield prefix.removesuffix("."), value
        return
    for key, part in parts.items():
        yield from _flat(part, f"{prefix}{key}.")
