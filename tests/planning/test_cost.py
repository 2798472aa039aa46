"""Work against what XLA counts, and times against arithmetic by hand."""

import json

import jax
import pytest

from jaxft.config_file import load_config
from jaxft.models.hf_config import decoder_config
from jaxft.planning.abstract import AbstractStep
from jaxft.planning.cost import MEMORY, NETWORK, PRODUCTS, Times, Work, times, work
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
    estimated, c = work(model, 2, 192, 1, full).hardware_flops, model.config
    masked = 2 * 4 * c.num_heads * c.head_dim * 192 * (191 / 2) * len(c.layers)  # forward
    masked *= 3.5 if "remat" == "none" or "attention" in changes["remat"] else 4.5
    assert estimated + masked == pytest.approx(counted, rel=0.06)


def test_lora_takes_four_flops_per_parameter_and_token_and_training_six():
    layers = 3 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 1024)
    tokens, attention = 2 * 192, 3 * 3 * 4 * 256 * (193 / 2)
    lora = work(step_of({"lora_target_modules": ["q_proj"], "lora_r": 1}).model, 2, 192, 1, False)
    full = work(step_of({"adapter": "none"}).model, 2, 192, 1, True)
    adapter, head = 6 * 3 * 512, 256 * 512
    assert lora.model_flops == tokens * (4 * (layers + head) + adapter + attention)
    assert full.model_flops == tokens * (6 * (layers + head) + attention)


def test_a_window_and_experts_save_work():
    near = RAW | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}
    pairs = 64 * 65 / 2 + 128 * 64
    saved = (192 * 193 / 2 - pairs) / 192
    wide, narrow = (work(step_of({}, raw).model, 2, 192, 1, False).model_flops for raw in (RAW, near))
    assert wide - narrow == pytest.approx(384 * 3 * 3 * 4 * 256 * saved)


def test_times_of_known_work():
    machine = Machine("chip", "tpu", 1, flops=1e12, bandwidth=1e9, ici=1e8, dcn=1e6, host=4)
    sent = [
        Collective("all-gather", ("fsdp",), "u4", 1, 10**8),
        Collective("all-reduce", ("data",), "f32", 1, 10**6),
        Collective("all-reduce", ("tensor",), "bf16", 1, 2 * 10**8),
    ]
    found = times(Work(1, 8e12, 5e9), sent, machine, 4, slow={"data"})
    assert found == (2 / PRODUCTS, 5 / MEMORY, pytest.approx(2 / NETWORK), pytest.approx(2 / NETWORK))
    assert found.step == pytest.approx(5 / MEMORY + 2 / NETWORK)
    assert found.bound_by == "memory bandwidth"
    assert Times(1.0, 0.1, 0.8, 0.9).bound_by == "collectives"
