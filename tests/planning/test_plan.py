"""Plans beside what runs take, and beside what is known of models."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from jaxft.config_file import load_config
from jaxft.models.hf_config import decoder_config
from jaxft.models.kernels import Choice
from jaxft.planning.abstract import AbstractStep
from jaxft.planning.cost import Times, Work
from jaxft.planning.hlo import Program
from jaxft.planning.machines import Topology, machines, topology
from jaxft.planning.plan import Memory, Plan, make_plan
from jaxft.planning.report import config_lines, describe
from jaxft.planning.search import least_activations, meshes, ranked, search
from jaxft.sharding.mesh import make_mesh

BASE = {"model_name_or_path": "org/model", "output_dir": "o", "datasets": ["d"], "packing": True}
GIB = 1 << 30


def decoder_of(material, name):
    return decoder_config(json.loads((material / "configs" / f"{name}_config.json").read_text()))


@pytest.fixture
def small():
    """A Llama with heads and layers for every axis of eight devices."""
    return decoder_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "vocab_size": 1024,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, overrides",
    [
        ("SmolLM2-135M-Instruct.config.json", ["dtype=float32", "remat=none", "micro_batch_size=2"]),
        ("SmolLM2-135M-Instruct.config.json", ["load_in_4bit=true", "micro_batch_size=4"]),
        ("SmolLM2-135M-Instruct.config.json", ["adapter=none", "remat=full", "gradient_accumulation_steps=2"]),
        ("Qwen--Qwen3-0.6B_config.json", ["remat=[attention, mlp]"]),
    ],
)
def test_a_run_takes_what_its_plan_says(material, model, overrides):
    script = Path(__file__).with_name("run_step.py")
    command = [sys.executable, script, material / "configs" / model, "packing=true", "max_length=512", *overrides]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["allocated"] == pytest.approx(found["planned"], rel=0.1)


def test_the_parts_of_the_memory(small):
    config = load_config(BASE | {"max_length": 128, "load_in_4bit": True, "lora_r": 8, "mesh": {"fsdp": 8}})
    plan = make_plan(config, small, topology("cpu:8"))
    memory = plan.memory
    per_layer = 4 * 128 * 128 + 3 * 128 * 512
    codes = 4 * per_layer / 2 + 4 * per_layer / 64 * 4
    whole = 1024 * 128 * 2 * 2 + (2 * 4 + 1) * 128 * 2 * 8 + 7 * 4 * 4 * 8  # norms and scales are on every device
    assert memory.base == (codes + whole) / 8
    factors = 4 * (4 * 8 * 256 + 3 * 8 * (128 + 512))
    assert memory.adapters == factors * 4 / 8
    assert memory.optimizer == pytest.approx(2 * memory.adapters, abs=64)
    assert memory.gradients == memory.adapters
    inputs = 4 * 128 * 128 * 2  # of every layer, which the backward pass needs
    assert inputs < memory.temporaries
    assert plan.tokens == 8 * 128
    longer = make_plan(config.model_copy(update={"max_length": 256}), small, topology("cpu:8")).memory
    for part in ("base", "adapters", "optimizer", "gradients"):
        assert getattr(longer, part) == getattr(memory, part), "rows decide temporaries alone"
    assert inputs <= longer.temporaries - memory.temporaries < 2 * memory.temporaries
    assert longer.total - memory.total == longer.temporaries - memory.temporaries
    assert memory.total >= memory.base + memory.adapters + memory.optimizer + memory.gradients + inputs


def test_the_total_is_what_the_compiler_allocates(small):
    config = load_config(BASE | {"max_length": 128, "lora_r": 8, "mesh": {"data": 1}})
    total = make_plan(config, small, topology("cpu:1")).memory.total
    step = AbstractStep(config, small, make_mesh({}, jax.devices()[:1]))
    stats = step.compile().memory_analysis()
    assert total >= stats.argument_size_in_bytes + stats.temp_size_in_bytes // 2
    assert total <= stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes


def test_what_is_sent(small):
    """FSDP gathers codes, as codes, once forward and once backward; the gradients of adapters are summed."""
    config = load_config(BASE | {"max_length": 128, "load_in_4bit": True, "lora_r": 8, "mesh": {"fsdp": 8}})
    sent = make_plan(config, small, topology("cpu:8")).collectives
    codes = sum(each.bytes for each in sent if each.kind == "all-gather" and each.dtype == "u8")
    per_layer = 4 * 128 * 128 + 3 * 128 * 512
    assert codes == 2 * 4 * per_layer * 7 / 8  # in a loop XLA's CPU backend has codes in bytes
    assert all(each.axes in [("fsdp",), ()] for each in sent)


def test_the_report_and_the_json_say_the_same(small):
    config = load_config(BASE | {"max_length": 128, "mesh": {"data": 2, "tensor": 4}, "remat": ["attention"]})
    plan = make_plan(config, small, topology("cpu:8"))
    told, text = plan.to_json(), describe(plan)
    assert set(told) >= {
        "fits", "capacity_bytes", "per_device_bytes", "mesh", "micro_batch_size", "remat", "collectives", "attention",
        "gradient_accumulation_steps",
        "step_seconds", "tokens_per_second_per_device", "bound_by", "compile_seconds",
    }  # fmt: skip
    assert json.loads(json.dumps(told)) == told
    assert told["fits"]
    assert "fits: " in text
    assert f"{told['per_device_bytes']['total'] / GIB:.2f}" in text
    assert f"{told['tokens_per_second_per_device']:,.0f} tokens/s a device, bound by {told['bound_by']}" in text
    assert "data 2 x tensor 4" in text
    assert "all-reduce" in text
    assert "remat all but attention" in text
    assert "attention blockwise, as there is no kernel for a cpu" in text
    assert told["attention"] == "blockwise"
    assert "held-out prompts" not in text
    with_prompts = config.model_copy(update={"val_set_size": 4, "exact_match_samples": 30})
    assert "not in it: the cache of 30 held-out prompts" in describe(replace(plan, config=with_prompts))
    silent = with_prompts.model_copy(update={"sample_prompts": 0, "exact_match_samples": 0})
    assert "held-out prompts" not in describe(replace(plan, config=silent))
    assert config_lines(plan) == (
        "mesh: {data: 2, tensor: 4}\nmicro_batch_size: 1\ngradient_accumulation_steps: 1\nremat: [attention]"
    )


def tiny_machine(memory, count=8):
    """CPU devices that pretend to have little memory and an accelerator's rates."""
    return Topology(replace(machines()["v5e"], memory=memory), jax.devices()[:count])


def test_what_does_not_fit_says_how_much_is_missing(small):
    config = load_config(BASE | {"max_length": 128, "mesh": {"data": 1}})
    plan = make_plan(config, small, tiny_machine(1 << 20, 1))
    assert not plan.fits
    short = (plan.memory.total - (1 << 20)) / GIB
    assert f"does not fit, short by {short:.2f} GiB" in describe(plan)


def test_what_is_offloaded_is_not_on_the_device(small):
    config = load_config(BASE | {"max_length": 128, "adapter": "none", "mesh": {"data": 1}})
    plans = [
        make_plan(config.model_copy(update={"offload": offload}), small, topology("cpu:1"))
        for offload in ([], ["optimizer"])
    ]
    assert plans[0].memory.optimizer == pytest.approx(2 * plans[0].memory.gradients, rel=0.01)
    assert plans[1].memory.optimizer < 100
    gpu = Topology(machines()["h100"], jax.devices()[:1])
    with pytest.raises(ValueError, match=r"offload: .* not known of GPUs that are not here"):
        make_plan(config.model_copy(update={"offload": ["optimizer"]}), small, gpu)


def test_meshes_are_those_that_the_model_can_have(small, material):
    config = load_config(BASE | {"max_length": 128})
    found = list(meshes(config, small, 8, host=8))
    assert {"data": 8, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1} in found
    assert {"data": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 4} in found
    assert all(mesh["context"] == mesh["expert"] == 1 for mesh in found)
    long = config.model_copy(update={"max_length": 65536})
    assert {mesh["context"] for mesh in meshes(long, small, 8, host=8)} == {1, 2, 4, 8}
    mixture = decoder_of(material, "Qwen--Qwen3-30B-A3B")
    assert {mesh["expert"] for mesh in meshes(config, mixture, 8, host=8)} == {1, 2, 4, 8}
    assert max(mesh["tensor"] for mesh in meshes(config, mixture, 8, host=8)) == 4  # of four key-value heads


@pytest.fixture
def planned(monkeypatch):
    """Plans that take 1 MiB and another for every row of a micro-batch, without compiling anything."""

    def make(config, decoder, topology):
        memory = Memory(0, 0, 0, 0, 0, (1 + config.micro_batch_size) << 20)
        seconds, done = Times(1 + 1 / config.micro_batch_size, 0, 0, 0), Work(1, ())
        mesh, kernel, program = config.mesh.model_dump(), Choice("blockwise", ""), Program({}, {}, frozenset())
        return Plan(topology, config, mesh, kernel, memory, 0.0, program, done, seconds, 1000)

    monkeypatch.setattr("jaxft.planning.search.make_plan", make)


MANY_ROWS = BASE | {"max_length": 128, "micro_batch_size": 2, "gradient_accumulation_steps": 4}
"""64 rows in an update of eight devices."""


def test_a_search_takes_the_fastest_that_fits(small, planned):
    config = load_config(MANY_ROWS)
    told = []
    found = search(config, small, tiny_machine(7 << 20), compilations=50, wanted=3, say=told.append)
    assert found.tried == told
    fitting = [plan for plan in found.tried if plan.fits]
    assert len(fitting) == 3
    assert found.best.tokens_per_second_per_device == max(plan.tokens_per_second_per_device for plan in fitting)


def test_a_search_passes_over_what_is_larger_than_what_did_not_fit(small, planned, monkeypatch):
    """Of a mesh whose micro batch of n rows does not fit with a remat, none of n or more rows that keeps as much."""
    config, machine = load_config(MANY_ROWS), tiny_machine(7 << 20)
    smallest_first = ranked(config, small, machine)[::-1]
    monkeypatch.setattr("jaxft.planning.search.ranked", lambda *_: smallest_first)
    found = search(config, small, machine, compilations=500, wanted=500)
    order, tried = [each.config for each in smallest_first], [plan.config for plan in found.tried]
    assert [each for each in order if each in tried] == tried
    skipped = [each for each in order if each not in tried]
    assert skipped
    too_large = [plan.config for plan in found.tried if not plan.fits]
    for each in skipped:
        assert any(one.mesh == each.mesh and one.micro_batch_size <= each.micro_batch_size for one in too_large)


def test_a_search_that_finds_nothing_ends_with_the_least_that_there_is(small, planned, monkeypatch):
    config = load_config(MANY_ROWS)
    monkeypatch.setattr(Plan, "fits", False)
    assert len(search(config, small, tiny_machine(7 << 20), compilations=2).tried) == 3
    nothing = search(config, small, tiny_machine(1 << 16))  # of which not even the weights fit
    assert nothing.best is None
    (plan,) = nothing.tried
    assert nothing.smallest == plan
    assert (plan.config.mesh.fsdp, plan.config.micro_batch_size, plan.config.remat) == (8, 1, "full")


def test_a_search_keeps_the_rows_of_an_update(small):
    config = load_config(MANY_ROWS)
    found = ranked(config, small, tiny_machine(1 << 40))
    assert len({str(each.config.mesh) for each in found}) > 3
    for each in (each.config for each in found):
        ways = each.mesh.data * each.mesh.fsdp * each.mesh.expert
        assert each.micro_batch_size * each.gradient_accumulation_steps * ways == 64
    with pytest.raises(ValueError, match=r"mesh: .*fsdp=3"):
        search(config.model_copy(update={"mesh": type(config.mesh)(fsdp=3)}), small, tiny_machine(1 << 40))


def test_candidates_that_cannot_fit_are_not_compiled(small):
    config = load_config(MANY_ROWS | {"gradient_accumulation_steps": 64})
    roomy, tight = (ranked(config, small, tiny_machine(memory)) for memory in (1 << 40, 3 << 20))
    assert max(each.config.micro_batch_size for each in roomy) == 512
    assert max(each.config.micro_batch_size for each in tight) < 64
    assert ranked(config, small, tiny_machine(1 << 16)) == []
    offloaded = ranked(config.model_copy(update={"offload": ["activations"]}), small, tiny_machine(1 << 40))
    assert {str(each.config.remat) for each in roomy} - {str(each.config.remat) for each in offloaded} == {"none"}
    speeds = [round(each.tokens_per_second) for each in roomy]
    assert speeds == sorted(speeds, reverse=True)


@pytest.mark.parametrize("remat", ["none", "full", ["attention", "mlp"]])
def test_the_least_that_activations_take_is_less_than_they_take(small, remat):
    config = load_config(BASE | {"max_length": 512, "micro_batch_size": 8, "remat": remat})
    step = AbstractStep(config, small, make_mesh({"data": 1}, jax.devices()[:1]))
    taken = step.compile().memory_analysis().temp_size_in_bytes
    assert 0.1 * taken < least_activations(step.model, 8 * 512) < taken
