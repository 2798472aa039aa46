"""Adapters on experts, as PEFT stores them.

Where the experts of a layer are one parameter (`target_parameters`), PEFT wraps the module that holds it, twice where
both parameters are adapted, and keeps the adapters of all experts in two matrices. Experts that have tensors of their
own in the checkpoint are such parameters in transformers 5, too: adapters by expert are converted when they are
loaded, and those that PEFT made come in the fused form.
"""

import dataclasses
from collections.abc import Collection, Mapping

import numpy as np

from jaxft.adapters.targets import LoraConfig, ends_with
from jaxft.models.decoder import Decoder, modules
from jaxft.models.experts import ExpertLinear

PREFIX = "base_model.model."
INSIDE, OUTSIDE = "gate_up_proj", "down_proj"
"""The parameters of experts; the wrapper of the first is inside that of the second."""


def wrapper(module: str, adapted: Collection[str]) -> str:
    """Where PEFT puts the adapter of a module; that of a parameter is called by the module that holds it."""
    container, _, name = module.rpartition(".")
    if not container.endswith(".experts"):
        return module
    return f"{container}.base_layer" if name == INSIDE and f"{container}.{OUTSIDE}" in adapted else container


def flat(part: str, value: np.ndarray) -> np.ndarray:
    """As PEFT stores it: A of experts [E, r, in] as [E r, in], B [E, out, r] as [out, r E]."""
    if value.ndim < 3:
        return value
    if part == "A":
        return value.reshape(-1, value.shape[-1])
    return np.moveaxis(value, 0, -1).reshape(value.shape[1], -1)


def unflat(part: str, value: np.ndarray, experts: int) -> np.ndarray:
    """The reverse of `flat`; a tensor that does not fit this number of experts stays unchanged."""
    if value.ndim != 2 or value.shape[0 if part == "A" else 1] % experts:
        return value
    if part == "A":
        return value.reshape(experts, -1, value.shape[1])
    return np.moveaxis(value.reshape(value.shape[0], -1, experts), -1, 0)


def split(
    model: Decoder, config: LoraConfig, tensors: Mapping[str, np.ndarray]
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Adapters by expert in place of fused ones, for a base whose experts have tensors of their own.

    Gate and up share their A; each takes its rows of B.
    """
    mixture = model.config.experts
    tensors, fused, endings = dict(tensors), set(), {}
    parameters_alone = dataclasses.replace(config, target_modules=[], rank_pattern={}, alpha_pattern={})
    for name, layers, module in modules(model):
        if not isinstance(module, ExpertLinear):
            continue
        projection = name.rpartition(".")[2]
        parameter = OUTSIDE if projection == "down_proj" else INSIDE
        rows = {"gate_proj": slice(None, mixture.intermediate_size), "up_proj": slice(mixture.intermediate_size, None)}
        for layer in layers:
            container = f"model.layers.{layer}.mlp.experts"
            held = parameters_alone.select((), [f"{container}.{each}" for each in (INSIDE, OUTSIDE)])
            keys = [f"{PREFIX}{wrapper(f'{container}.{parameter}', held)}.lora_{part}.weight" for part in "AB"]
            if f"{container}.{parameter}" not in held or not all(key in tensors for key in keys):
                continue
            fused |= set(keys)
            A, B = (unflat(part, tensors[key], mixture.count) for part, key in zip("AB", keys, strict=True))
            experts = model.config.names(name, range(layer, layer + 1), mixture.count)
            for expert, each in enumerate(experts):
                tensors[f"{PREFIX}{each}.lora_A.weight"] = A[expert]
                tensors[f"{PREFIX}{each}.lora_B.weight"] = B[expert][rows.get(projection, slice(None))]
            endings[experts[0].rpartition(".")[2]] = f"{container}.{parameter}"
    return _by_expert(config, endings), {key: value for key, value in tensors.items() if key not in fused}


def _by_expert(config: LoraConfig, endings: Mapping[str, str]) -> LoraConfig:
    """The settings with modules of experts, by how their names end, in place of the parameters they come from."""
    patterns = {ending: rf"experts\.\d+\.{ending}" for ending in endings}
    targets = config.target_modules
    if isinstance(targets, str):
        targets = rf"(?:{targets})|.*\.(?:{'|'.join(patterns.values())})"
    else:
        targets = [*targets, *endings]

    def of_modules(option: Mapping[str, float]) -> dict[str, float]:
        return {key: value for key, value in option.items() if not any(ends_with(key, p) for p in endings.values())}

    return dataclasses.replace(
        config,
        target_modules=targets,
        target_parameters=(),
        rank_pattern={patterns[e]: config.rank(p) for e, p in endings.items()} | of_modules(config.rank_pattern),
        alpha_pattern={patterns[e]: config.alpha(p) for e, p in endings.items()} | of_modules(config.alpha_pattern),
    )
