"""Work against what XLA counts, and times against arithmetic by hand."""

import json

import jax
import pytest

from jaxft.config_file import load_config
from jaxft.models.hf_config import decoder_config
from jaxft.planning.abstract import AbstractStep
from jaxft.planning.cost import MEMORY, NETWORK, PRODUCTS, Part, Times, Work, times, work
from jaxft.planning.hlo import Collective
from jaxft.planning.machines import Machine
from jaxft.sharding.mesh import make_mesh

RAW = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
BASE = {"model_name_or_path": "m", "output_dir": "o", "datasets": ["d"], "max_length": 192, "dtype": "float32"}
ONE_LAYER = RAW | {"num_hidden_layers": 1}


def step_of(changes, raw=None):
    config = load_config(BASE | {"micro_batch_size": 2} | changes)
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    return AbstractStep(config, decoder_config(raw or RAW), mesh)


@pytest.mark.parametrize(
    "changes",
    [
        {"remat": "none"},
        {"remat": "full"},
        {"remat": ["qkv", "mlp"]},
        {"remat": "dots"},
        {"remat": ["attention", "attention_out"]},
        {"remat": "none", "lora_target_modules": ["q_proj", "down_proj"], "lora_r": 64},
        {"remat": "full", "adapter": "none"},
    ],
    ids=json.dumps,
)
def test_hardware_flops_are_those_that_xla_counts(changes):
    """XLA counts the body of a loop once: of the three layers one, and of attention one block, which is the whole row.

    It counts elementwise operations, too, and the masked half of the scores, which here is computed. Where a single
    layer is compiled, or each by itself, it finds that what is computed again is there already.
    """
    counted = step_of(changes).compile().cost_analysis()["flops"]
    full, model = changes.get("adapter") == "none", step_of(changes, ONE_LAYER).model
    estimated, c = work(model, 2, 192, 1, full, "blockwise").hardware_flops, model.config
    masked = 2 * 4 * c.num_heads * c.head_dim * 192 * (191 / 2) * len(c.layers)  # forward
    masked *= 3.5 if changes["remat"] == "none" or "attention" in changes["remat"] else 4.5
    assert estimated + masked == pytest.approx(counted, rel=0.06)


def test_lora_takes_four_flops_per_parameter_and_token_and_training_six():
    layers = 3 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 1024)
    tokens, attention = 2 * 192, 3 * 3 * 4 * 256 * (193 / 2)
    lora = work(step_of({"lora_target_modules": ["q_proj"], "lora_r": 1}).model, 2, 192, 1, False, "cudnn")
    full = work(step_of({"adapter": "none"}).model, 2, 192, 1, True, "cudnn")
    adapter, head = 6 * 3 * 512, 256 * 512
    assert lora.model_flops == tokens * (4 * (layers + head) + adapter + attention)
    assert full.model_flops == tokens * (6 * (layers + head) + attention)


def test_a_window_and_experts_save_work():
    near = RAW | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}
    pairs = 64 * 65 / 2 + 128 * 64
    saved = (192 * 193 / 2 - pairs) / 192
    wide, narrow = (work(step_of({}, raw).model, 2, 192, 1, False, "cudnn").model_flops for raw in (RAW, near))
    assert wide - narrow == pytest.approx(384 * 3 * 3 * 4 * 256 * saved)


def test_times_of_known_work():
    machine = Machine("chip", "tpu", 1, flops=1e12, bandwidth=1e9, ici=1e8, dcn=1e6, host=4)
    sent = [
        Collective("all-gather", ("fsdp",), "u4", 1, 10**8),
        Collective("all-reduce", ("data",), "f32", 1, 10**6),
        Collective("all-reduce", ("tensor",), "bf16", 1, 2 * 10**8),
    ]
    parts = Part("layers", 8e12, 1e9), Part("attention", 4e11, 5e9), Part("optimizer", 0, 2e9)
    found = times(Work(1, parts), sent, machine, 4, slow={"data"})
    assert found == (2 / PRODUCTS, pytest.approx(7 / MEMORY), pytest.approx(2 / NETWORK), pytest.approx(2 / NETWORK))
    assert found.step == pytest.approx(2 / PRODUCTS + 7 / MEMORY + 2 / NETWORK)
    assert found.bound_by == "memory bandwidth"
    assert Times(1.0, 0.1, 0.8, 0.9).bound_by == "matrix products"
    assert Times(1.0, 0.9, 1.2, 0).bound_by == "matrix products"  # they go on beside the network
    assert Times(1.0, 0.9, 2.0, 0).bound_by == Times(1.0, 0.9, 0, 1.1).bound_by == "collectives"


def test_memory_that_is_moved():
    """By hand, for one layer of a few tokens, where weights are all that counts."""
    layer = 256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 1024
    head = 512 * 256

    def moved(**changes):
        step = step_of(
            {"dtype": "bfloat16", "remat": "none", "max_length": 1, "micro_batch_size": 1} | changes, ONE_LAYER
        )
        parts = work(step.model, 1, 1, 3, changes.get("adapter") == "none", "cudnn", trained=1000).parts
        return {part.name: part.bytes for part in parts}

    plain = moved()
    activations = 2 * 3 * 2 * (2 * (256 + 128) + 2 * 512 + 3 * 1280)
    assert plain["layers"] == 3 * (2 * 2 * layer + activations)  # forward and backward, as it is stored
    assert plain["loss"] == 3 * (2 * 2 * head + 512 * 12)
    assert (plain["attention"], plain["gradients"], plain["optimizer"]) == (0, 9000, 7000)
    again = moved(remat="full")
    down = 256 * 1024, 2 * 3 * 2 * 1280 / 2  # which is not computed again
    assert again["layers"] == 3 * (1.5 * (2 * 2 * layer + activations) - 2 * down[0] - down[1])
    codes = layer / 2 + layer / 64 * 4
    assert moved(load_in_4bit=True)["layers"] == 3 * (2 * (codes + 4 * layer) + activations)
    whole = moved(adapter="none")  # stored in float32, multiplied in bfloat16, and once more for the weights' gradient
    assert whole["layers"] == 3 * 1.5 * (2 * (4 + 4) * layer + activations)
    assert moved(remat=["qkv", "attention_out", "mlp"])["layers"] == plain["layers"]


def test_scores_that_are_not_kept_on_the_chip_are_moved():
    model = step_of({"remat": "none"}).model
    in_blocks, fused = (
        {part.name: part for part in work(model, 2, 192, 1, False, kernel).parts}["attention"]
        for kernel in ("blockwise", "cudnn")
    )
    assert in_blocks.flops == fused.flops
    scores = 2 * 3 * 4 * 192 * 193 / 2  # rows, layers, heads, pairs
    assert (in_blocks.bytes, fused.bytes) == (pytest.approx(3.5 * 12 * scores), 0)


def test_a_token_meets_some_experts_and_many_tokens_all():
    raw = {
        "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 128, "intermediate_size": 128,
    }  # fmt: skip
    model = step_of({"dtype": "bfloat16", "remat": "none"}, raw).model
    one, many = ({p.name: p.bytes for p in work(model, n, 1, 1, False, "cudnn").parts}["layers"] for n in (1, 1000))
    experts, attention = 3 * 64 * 128, 2 * 64 * 64 + 2 * 64 * 32
    features = 2 * 128 + 2 * 96 + 2 * 3 * 192
    assert one == 2 * (2 * (attention + 2 * experts) + 3 * 2 * features)
    assert many == 2 * (2 * (attention + 8 * experts) + 3 * 2 * 1000 * features)
