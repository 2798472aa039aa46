"""Convert an adapter to the form that every LoRA reader scales alike: alpha = r, the same rank everywhere.

Readers scale a module differently: some use alpha / r of the settings for all modules, some use alpha of the settings
over the rank of the module's tensors, some know rsLoRA and patterns. With s B in place of B, all ranks padded with
zeros to the largest, and alpha = r, all of these scales are 1.

Some readers also want query, key and value adapted together, and all layers alike: adapters of zeros fill the gaps.
"""

import numpy as np

from jaxft.adapters.attach import Factors, attach_factors, detach, factors_of, sites
from jaxft.adapters.targets import LoraConfig
from jaxft.models.decoder import Decoder

_TOGETHER = {"q_proj", "k_proj", "v_proj"}


def portable(model: Decoder) -> Decoder:
    """The model with its adapter in that form. It computes the same.

    Raises:
        ValueError: there is no adapter, or it is DoRA, which only some readers know.
    """
    scales, dropout = {}, 0.0
    for site in sites(model):
        if (lora := site.linear.adapter) is None:
            continue
        if lora.spec.use_dora:
            raise ValueError("DoRA rescales the base's rows, which no plain LoRA can: export it with --format merged")
        scales |= dict(zip(site.modules, lora.spec.scales, strict=True))
        dropout = lora.spec.dropout
    factors = {name: _folded(part, scales[name]) for name, part in factors_of(model).items()}
    if not factors:
        raise ValueError("the model carries no adapter")
    rank = max(part.A.shape[-2] for part in factors.values())
    filled = {name: _filled(part, rank) for name, part in _missing(model, set(factors)).items()}
    filled |= {name: _filled(part, rank) for name, part in factors.items()}
    option: dict[str | None, list[str]] = {"target_modules": [], "target_parameters": []}
    for site in sites(model):
        option.setdefault(site.target, []).extend(name for name in site.modules if name in filled)
    config = LoraConfig(rank, rank, option["target_modules"], option["target_parameters"], lora_dropout=dropout)
    return attach_factors(detach(model), config, filled)


def _missing(model: Decoder, adapted: set[str]) -> dict[str, Factors]:
    """Adapters of rank 0 that make all layers alike, with query, key and value together."""
    short = {name.rpartition(".")[2] for name in adapted}
    if short & _TOGETHER:
        short |= _TOGETHER
    missing = {}
    for site in sites(model):
        for name in site.modules if site.target == "target_modules" else ():
            if name.rpartition(".")[2] in short and name not in adapted:
                out_features, in_features = site.shape
                missing[name] = Factors(np.zeros((0, in_features), np.float32), np.zeros((out_features, 0), np.float32))
    return missing


def _folded(factors: Factors, scale: float) -> Factors:
    return Factors(factors.A, (factors.B * np.float64(scale)).astype(np.float32))


def _filled(factors: Factors, rank: int) -> Factors:
    """The factors padded to this rank with zero rows of A and zero columns of B."""
    missing = rank - factors.A.shape[-2]
    lead = [(0, 0)] * (factors.A.ndim - 2)
    return Factors(np.pad(factors.A, [*lead, (0, missing), (0, 0)]), np.pad(factors.B, [*lead, (0, 0), (0, missing)]))
