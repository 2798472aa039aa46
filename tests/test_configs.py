"""Configs that name a machine: they fit there, as the header says, and the step holds nothing that it should not."""

import math
import re
import sys
from pathlib import Path

import jax
import pytest

from jaxft.config_file import load_config
from jaxft.hub.model_files import read_json
from jaxft.models.decoder import describe, parameters
from jaxft.models.hf_config import decoder_config
from jaxft.planning.plan import GIB, make_plan

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if "# Plan for" in path.read_text())
MODELS = {
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama--Meta-Llama-3.1-8B_config.json",
    "meta-llama/Llama-3.1-70B-Instruct": "meta-llama--Meta-Llama-3.1-70B_config.json",
    "meta-llama/Llama-3.1-405B-Instruct": "meta-llama--Meta-Llama-3.1-405B_config.json",
    "meta-llama/Llama-3.2-1B-Instruct": "Llama-3.2-1B-Instruct.config.json",
    "Qwen/Qwen3-30B-A3B": "Qwen--Qwen3-30B-A3B_config.json",
    "google/gemma-3-4b-it": "gemma3_4b.config.json",
}
FLOATS = ("bf16", "f16", "f32")


def test_there_is_a_config_for_every_machine_that_people_have():
    machines = {re.search(r"# Plan for (\S+),", path.read_text())[1] for path in CONFIGS}
    assert machines >= {"rtx4090:1", "h100:1", "h100:8", "h200:1", "v5e:1x1", "v5e:2x4", "v5e:4x4", "t4:1"}


@pytest.mark.slow
@pytest.mark.ahead
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_fits_its_machine(path, material, machine):
    text, given = path.read_text(), load_config(path)
    name = re.search(r"# Plan for (\S+),", text)[1]
    promised = float(re.search(r"^#     total +([\d.]+) of", text, re.MULTILINE)[1])
    decoder = decoder_config(read_json(material / "configs" / MODELS[given.model_name_or_path]))
    # A little shorter, so that the length of a row is no other size of the model.
    config = given.model_copy(update={"max_length": given.max_length - 256})
    plan = make_plan(config, decoder, machine(name))
    assert plan.fits
    assert 0.8 * promised < plan.memory.total / GIB < 1.05 * promised

    mesh, largest = plan.mesh, [buffer.array for buffer in plan.program.largest_buffers(10)]
    vocabulary, rows = decoder.vocab_size // mesh["tensor"], config.max_length
    for array in largest:
        size = math.prod(array.shape)
        if vocabulary in array.shape:
            of_weights = decoder.hidden_size % (size // vocabulary) == 0
            assert of_weights, f"{array} are logits"
            assert array.dtype == "bf16" or config.adapter == "none", f"{array} are logits"
        assert array.shape.count(rows) < 2, f"{array} are scores"
    if config.quant_type is not None:  # a product takes one matrix, dequantized; no loop may leave more of them
        one_layer = decoder.experts.count if decoder.experts else 1  # matrices; experts are dequantized together
        quantized = [p.tensor_shape for p, _ in parameters(describe(decoder)) if p.name.endswith("_proj.weight")]
        for array in largest:
            sizes = {tuple(sorted(shape)) for shape in quantized}
            stacked = len(array.shape) > 2 and tuple(sorted(array.shape[-2:])) in sizes
            dequantized = stacked and array.dtype in FLOATS and math.prod(array.shape[:-2]) > one_layer
            assert not dequantized, f"{array} is a dequantized stack of layers"


@pytest.mark.slow
@pytest.mark.ahead
def test_compiling_takes_no_longer_for_a_deep_model(material, machine):
    """Llama-3.1-70B with its 80 layers, and with 8 of them: layers are compiled once, whatever their number."""
    raw = read_json(material / "configs" / MODELS["meta-llama/Llama-3.1-70B-Instruct"])
    config = load_config(ROOT / "configs" / "llama3.1-70b_qlora_8xh100.yaml")
    eight = machine("h100:8")
    shallow, deep = decoder_config(raw | {"num_hidden_layers": 8}), decoder_config(raw)
    jax.config.update("jax_enable_compilation_cache", False)
    make_plan(config, shallow, eight)  # what is loaded and traced once
    seconds = [min(make_plan(config, model, eight).compile_seconds for _ in range(2)) for model in (shallow, deep)]
    print(f"compiled in {seconds[0]:.1f} s and {seconds[1]:.1f} s", file=sys.stderr)
    assert seconds[1] < 1.5 * seconds[0]
