"""Write docs/families.md from the code and from a parity run.

`python scripts/make_family_docs.py --measure` compares the random models of tests/models/test_families.py with
transformers (two minutes; torch is needed) and keeps the largest errors in docs/parity.json; without `--measure` the
page is written from what was kept.
"""

import argparse
import json
import runpy
import tempfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

import jaxft
from jaxft.adapters.attach import sites
from jaxft.hub.gguf import ARCHITECTURES
from jaxft.hub.load import is_quantized
from jaxft.hub.prequantized import METHODS
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import describe, parameters
from jaxft.models.families import FAMILIES
from jaxft.models.hf_config import WITH_VISION, decoder_config

ROOT = Path(__file__).resolve().parents[1]
TARGET, PARITY = ROOT / "docs" / "families.md", ROOT / "docs" / "parity.json"
OPENING = """# Families

What `model_type` of a config.json may be, and what is known of each. This page is written by
`scripts/make_family_docs.py`; how a family is added is told in [adding_a_family.md](adding_a_family.md).

- **Logit error** is the largest difference to transformers over random models that exercise the axes of the config, in
  float32, as a part of the largest logit.
- **LoRA** sits on the modules named; `all-linear` means all of them but those in brackets. Where the experts of a layer
  are one tensor, `lora_target_parameters` names them. Routers carry none.
- **Quantized** to int8, int4 or nf4 are these weights; all others stay in `dtype`.
"""
CONSUMERS = """## What consumers make of an adapter

- **PEFT** loads what is exported here; where it would drop a part or scale it wrongly, attaching or exporting refuses:
  DoRA, dropout or rsLoRA on experts, adapters on some experts only, on the experts of Qwen2-MoE, or on the dense
  feed-forward layers of Qwen3-MoE.
- **vLLM** rejects DoRA, and ranks above its `max_lora_rank`. It honours rsLoRA and patterns.
- **llama.cpp** (`convert_lora_to_gguf`) scales by `lora_alpha` over the rank of a tensor: rsLoRA and `alpha_pattern`
  come out wrong there.
- **SGLang** scales by `lora_alpha / r` only, and wants `v_proj` beside `q_proj`.

A merged model (`scripts/export.py --format merged`) has none of these limits.
"""


def stored() -> str:
    """What checkpoints may be, from the tables of those who read them."""
    listed = {
        "Models with vision whose part for text is of one of these families": sorted(WITH_VISION),
        "Quantized checkpoints (`quant_method`)": sorted(METHODS),
        "GGUF files (`general.architecture`)": sorted(ARCHITECTURES),
    }
    lines = [f"- {what}: {', '.join(f'`{name}`' for name in names)}" for what, names in listed.items()]
    return "\n".join(["## What else loads", "", *lines])


def measure() -> dict[str, dict[str, float | int]]:
    """model_type -> number of random models, and the largest difference of their logits to transformers', as a part of
    the largest logit of the model."""
    tests = runpy.run_path(str(ROOT / "tests" / "models" / "test_families.py"))
    tokens = np.random.default_rng(0).integers(0, tests["VOCAB"], (2, tests["LENGTH"]), dtype=np.int32)
    by_type = sorted(tests["CONFIGS"].items(), key=lambda item: item[1].model_type)
    result = {}
    for model_type, entries in groupby(by_type, key=lambda item: item[1].model_type):
        errors = []
        for name, config in entries:
            reference = tests["random_model"](config, seed=len(name))
            with tempfile.TemporaryDirectory() as directory:
                reference.save_pretrained(directory)
                ours = jaxft.load_model(directory)(tokens)
            theirs = tests["torch_logits"](reference, tokens)
            errors.append(float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()))
        result[model_type] = {"models": len(errors), "relative_logit_error": float(f"{max(errors):.1e}")}
    return result


def page(parity: dict[str, dict[str, float | int]]) -> str:
    rows = [
        "| model_type | checkpoints | logit error (models) | LoRA | quantized | PEFT layout | caveats |",
        "|---|---|---|---|---|---|---|",
    ]
    for model_type, family in sorted(FAMILIES.items()):
        config = decoder_config({"model_type": model_type, "num_hidden_layers": 8, "n_layer": 8})
        model = describe(config)
        adapted = _last_parts(site.modules[0] for site in sites(model) if site.target == "target_modules")
        if model.lm_head is not None:
            adapted = [*adapted[1:], f"[{adapted[0]}]"]
        quantized = _last_parts(p.names[0].removesuffix(".weight") for p, _ in parameters(model) if is_quantized(p))
        cells = [
            f"`{model_type}`",
            family.__doc__.strip().rstrip("."),
            f"{parity[model_type]['relative_logit_error']:.1e} ({parity[model_type]['models']})",
            ", ".join(adapted),
            ", ".join(quantized),
            "experts as parameters" if config.experts and config.experts.adapters == "target_parameters" else "modules",
            "; ".join(_caveats(config)),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([OPENING, *rows, "", stored(), "", CONSUMERS])


def _last_parts(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _caveats(config: DecoderConfig) -> Iterator[str]:
    if config.transposed:
        yield "adapters say `fan_in_fan_out`; quantized checkpoints do not load"
    if config.experts is not None:
        if config.experts.adapters is None:
            yield "experts stay frozen: PEFT drops their adapters"
        else:
            yield "no DoRA, no dropout on experts"
        if config.experts.adapters == "target_modules":
            yield "no rsLoRA on experts; adapters on all of them or none"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write docs/families.md.")
    parser.add_argument("--measure", action="store_true", help="compare with transformers first")
    if parser.parse_args().measure:
        PARITY.write_text(json.dumps(measure(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    TARGET.write_text(page(json.loads(PARITY.read_text(encoding="utf-8"))), encoding="utf-8")
