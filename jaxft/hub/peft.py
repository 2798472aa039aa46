"""Read and write PEFT adapter directories: `adapter_config.json` and `adapter_model.safetensors`.

PEFT itself ignores tensors it does not know and only warns of those it misses; here every key must fit a module and
every selected module must have its keys. The settings are read as strictly (`jaxft.hub.peft_config`): what a
`LoraConfig` cannot say (biases, saved modules, initialisations that change the base) is refused.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.adapters.attach import Factors, attach_factors, check_experts, factors_of, sites, targets_of
from jaxft.adapters.targets import OUTPUT_HEAD, LoraConfig
from jaxft.hub.checkpoint import Checkpoint
from jaxft.hub.digests import check_digests, write_digests
from jaxft.hub.model_files import read_json
from jaxft.hub.peft_config import CONFIG_FILE, read_adapter_config
from jaxft.hub.peft_experts import PREFIX, flat, split, unflat, wrapper
from jaxft.hub.safetensors_writer import write_safetensors
from jaxft.hub.stage import staged_in
from jaxft.models.config import Source
from jaxft.models.decoder import Decoder
from jaxft.sharding.arrays import on_host
from jaxft.sharding.hosts import is_writer

TENSOR_STEM = "adapter_model"
FINGERPRINT = "jaxft_base_fingerprint"
HEAD_COPY = f"{PREFIX}{OUTPUT_HEAD}.base_layer.weight"
"""PEFT adds the unchanged output head to an adapter that targets it."""
_PARTS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude"}


def load_adapter(model: Decoder, directory: str | Path, *, check_base: bool = True) -> Decoder:
    """The model with the adapter of a PEFT directory on it (LoRA, rsLoRA, DoRA, rank and alpha patterns).

    Args:
        model: the base, with or without quantization, without adapter.
        directory: holds adapter_config.json and adapter_model.safetensors.
        check_base: refuse an adapter that records another base's fingerprint (adapters written here do).

    Raises:
        ValueError: the adapter does not fit the model, uses something unsupported, or is not as jaxft wrote it.
    """
    directory = Path(directory).expanduser()
    check_digests(directory)
    config = read_adapter_config(directory)
    checkpoint = Checkpoint.open(directory, stem=TENSOR_STEM)
    if check_base:
        _check_base(model, checkpoint, directory)
    shapes = {module: site.shape for site in sites(model) for module in site.modules}
    if read_json(directory / CONFIG_FILE).get("fan_in_fan_out") and not model.config.transposed:
        raise ValueError(f"{directory / CONFIG_FILE}: fan_in_fan_out is for GPT-2's layers; this base has none")
    tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
    try:
        if config.target_parameters and model.config.experts and not model.config.experts.fused:
            config, tensors = split(model, config, tensors)
        selected = targets_of(model, config)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG_FILE}: {error}") from error
    found = _group_keys(tensors, directory, config, selected)
    _compare_modules(directory, set(found), selected, set(shapes))
    _check_head_copy(model, checkpoint, directory)
    factors = {}
    for module, keys in found.items():
        experts = shapes[module][:-2]
        parts = {part: np.asarray(tensors[key], np.float32) for part, key in keys.items()}
        if experts:
            parts = {part: unflat(part, value, *experts) for part, value in parts.items()}
        factors[module] = Factors(**parts)
        _check_shapes(directory, module, factors[module], config.rank(module), shapes[module])
    return attach_factors(model, config, factors)


def save_adapter(model: Decoder, directory: str | Path) -> Path:
    """Write the model's adapter as a PEFT directory, in float32, with the digests of its files. Returns the directory.

    Of several processes all call it, and process 0 writes.

    Raises:
        ValueError: the model carries no adapter, or one that PEFT could not load.
    """
    factors = factors_of(model)
    if not factors:
        raise ValueError("the model carries no adapter to save")
    check_experts(model)
    directory = Path(directory).expanduser()
    tensors = {}
    for module, parts in factors.items():
        for suffix, part in _PARTS.items():
            if (value := getattr(parts, part)) is not None:
                tensors[f"{PREFIX}{wrapper(module, factors)}.{suffix}"] = flat(part, value)
    metadata = {"format": "pt"}
    if model.source is not None:
        metadata[FINGERPRINT] = model.source.fingerprint
    if not is_writer():
        return directory
    text = json.dumps(_adapter_config(model, factors), indent=2, sort_keys=True) + "\n"
    with staged_in(directory) as stage:
        write_safetensors(stage / f"{TENSOR_STEM}.safetensors", tensors, lambda name: tensors[name], metadata)
        (stage / CONFIG_FILE).write_text(text, encoding="utf-8")
        write_digests(stage)
    return directory


def base_of(source: Source | None) -> tuple[str | None, str | None]:
    """What an adapter calls its base: the repository and the commit, or the absolute path of a directory or file."""
    if source is None or source.revision is not None:
        return (None, None) if source is None else (source.name, source.revision)
    return os.path.abspath(source.path), None


def _adapter_config(model: Decoder, factors: dict[str, Factors]) -> dict[str, Any]:
    """The settings from which PEFT rebuilds this adapter: the commonest rank and alpha, patterns for the others."""
    ranks, alphas = {}, {}
    for site in sites(model):
        lora = site.linear.adapter
        if lora is None:
            continue
        spec = lora.spec
        for module, rank, alpha in zip(site.modules, spec.ranks, spec.alphas, strict=True):
            if rank:
                ranks[module], alphas[module] = rank, alpha
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    base, revision = base_of(model.source)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _plain(alpha),
        "lora_dropout": spec.dropout,
        "target_modules": _targets(model, set(factors), "target_modules"),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {re.escape(module): rank for module, rank in ranks.items() if rank != r},
        "alpha_pattern": {re.escape(module): _plain(value) for module, value in alphas.items() if value != alpha},
        "use_rslora": spec.use_rslora,
        "use_dora": spec.use_dora,
        "lora_bias": False,
        "bias": "none",
        "fan_in_fan_out": model.config.transposed,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_parameters": _targets(model, set(factors), "target_parameters") or None,
        "trainable_token_indices": None,
    }


def _targets(model: Decoder, adapted: set[str], option: str) -> list[str]:
    """Short names where every linear layer of that name is adapted, whole module names elsewhere.

    In a model that can see there are other layers of these names, so whole names are given.
    """
    by_name: dict[str, list[str]] = {}
    for site in sites(model):
        for module in site.modules if site.target == option else ():
            short = re.search(r"[^.]+$" if option == "target_modules" else r"[^.]+\.[^.]+$", module)[0]
            by_name.setdefault(short, []).append(module)
    targets = []
    for name, modules in by_name.items():
        present = [module for module in modules if module in adapted]
        everywhere = len(present) == len(modules) and model.config.part_of is None
        targets.extend([name] if everywhere else present)
    return targets


def _group_keys(
    tensors: Collection[str], directory: Path, config: LoraConfig, selected: set[str]
) -> dict[str, dict[str, str]]:
    """module -> part -> tensor name; every key must be understood, every module complete."""
    modules = {wrapper(module, selected): module for module in selected}
    found: dict[str, dict[str, str]] = {}
    strange = []
    for key in tensors:
        if key == HEAD_COPY:
            continue
        suffix = next((suffix for suffix in _PARTS if key.endswith(f".{suffix}")), None)
        if suffix is None or not key.startswith(PREFIX):
            strange.append(key)
        else:
            name = key[len(PREFIX) : -len(suffix) - 1]
            found.setdefault(modules.get(name, name), {})[_PARTS[suffix]] = key
    if strange:
        raise ValueError(
            f"{directory}: tensors that are no part of a LoRA on linear layers: {', '.join(sorted(strange)[:6])} "
            f"(expected {PREFIX}<module>.lora_A.weight and .lora_B.weight)"
        )
    wanted = {"A", "B", "magnitude"} if config.use_dora else {"A", "B"}
    for module, parts in found.items():
        if set(parts) != wanted:
            raise ValueError(
                f"{directory}: {module} has {', '.join(sorted(parts.values()))}, "
                f"expected {', '.join(sorted(wanted))} (use_dora is {config.use_dora})"
            )
    return found


def _compare_modules(directory: Path, found: set[str], selected: set[str], known: set[str]) -> None:
    for names, problem in (
        (found - known, "the adapter has tensors for modules that the model has not"),
        (selected - found, "adapter_config.json selects modules that have no tensors"),
        ((found & known) - selected, "the adapter has tensors that adapter_config.json does not select"),
    ):
        if names:
            shown = sorted(names)
            raise ValueError(f"{directory}: {problem}: {', '.join(shown[:6])}{', ...' if len(shown) > 6 else ''}")


def _check_shapes(directory: Path, module: str, factors: Factors, rank: int, shape: tuple[int, ...]) -> None:
    *experts, out_features, in_features = shape
    expected = {"A": (*experts, rank, in_features), "B": (*experts, out_features, rank), "magnitude": (out_features,)}
    for part, value in factors._asdict().items():
        if value is not None and value.shape != expected[part]:
            raise ValueError(
                f"{directory}: {module}: {part} is {value.shape}, expected {expected[part]}: "
                "the adapter was made for another base, or its config gives another rank"
            )


def _check_base(model: Decoder, checkpoint: Checkpoint, directory: Path) -> None:
    recorded = checkpoint.metadata.get(FINGERPRINT)
    if recorded and model.source is not None and recorded != model.source.fingerprint:
        raise ValueError(
            f"{directory}: the adapter was trained on other weights than {model.source.name} "
            "(fingerprints differ); in Python, load_adapter(..., check_base=False) loads it all the same"
        )


def _check_head_copy(model: Decoder, checkpoint: Checkpoint, directory: Path) -> None:
    weight = model.head.weight.get_value()
    if HEAD_COPY not in checkpoint.names() or isinstance(weight, jax.core.Tracer):  # a tracer has no values
        return
    if not np.array_equal(checkpoint.read(HEAD_COPY).astype(weight.dtype), on_host(weight)):
        raise ValueError(f"{directory}: {HEAD_COPY} is not the base's output head: made for another base")


def _plain(alpha: float) -> float | int:
    return int(alpha) if float(alpha).is_integer() else alpha
