"""Mixtures of experts on a mesh: every way to cut them gives the loss and the gradients of one device."""

import jax
import numpy as np
import pytest
from flax import nnx

import jaxft
from jaxft.adapters.attach import attach, attach_factors, factors_of
from jaxft.adapters.targets import LoraConfig
from jaxft.data.batch import Batch
from jaxft.models.hf_config import decoder_config
from jaxft.models.linear import Adapter
from jaxft.models.placement import check_mesh
from jaxft.objectives.sft import Sft
from jaxft.quantization.nf4 import NF4
from jaxft.sharding.mesh import batch_sharding, make_mesh
from jaxft.training.state import Partition
from jaxft.training.step import tally

SIZES = dict(
    vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=64, num_experts_per_tok=3, tie_word_embeddings=False,
)  # fmt: skip
MODELS = {
    "qwen2_moe": SIZES | dict(num_experts=8, moe_intermediate_size=256, shared_expert_intermediate_size=128),
    "qwen3_moe": SIZES | dict(num_experts=8, moe_intermediate_size=256),
    "gpt_oss": SIZES | dict(num_local_experts=8, sliding_window=7),
}
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@pytest.fixture(scope="module")
def directories(random_checkpoint):
    return {name: random_checkpoint(dict(model_type=name) | sizes) for name, sizes in MODELS.items()}


def packed_batch(rows: int = 8, length: int = 16) -> Batch:
    rng = np.random.default_rng(0)
    segments = np.repeat([[1, 2]], length // 2, axis=1).repeat(rows, axis=0).astype(np.int32)
    segments[rows // 2 :, -3:] = 0
    positions = np.tile(np.arange(length // 2, dtype=np.int32), (rows, 2))
    tokens = rng.integers(0, 96, (rows, length), dtype=np.int32)
    return Batch(tokens, rng.random((rows, length)) < 0.7, segments, positions)


def gradients(directory, form: str | None, mesh, trained_type):
    model = jaxft.load_model(directory, "float32", form, mesh)
    if trained_type is Adapter:
        fused = model.config.experts.fused
        config = LoraConfig(r=4, lora_alpha=8, target_parameters=EXPERTS if fused else ())
        model = attach(model, config, jax.random.key(1))
        model = attach_factors(
            jaxft.load_model(directory, "float32", form, mesh),
            config,
            {module: f._replace(B=f.B + 0.02) for module, f in factors_of(model).items()},
        )
    partition = Partition(model, trained_type)
    trained, frozen = partition.split(model)
    batch = packed_batch() if mesh is None else jax.device_put(packed_batch(), batch_sharding(mesh))

    @jax.jit
    def run(trained, frozen, batch):
        def loss(trained):
            return tally(partition.join(trained, frozen), trained_type, Sft(), batch, None)[:2]

        return jax.value_and_grad(loss, has_aux=True)(trained)

    (total, count), gradient = run(trained, frozen, batch)
    return float(total) / float(count), jax.tree.map(np.asarray, gradient)


@pytest.mark.parametrize(
    "name, form, mesh, trained_type",
    [
        ("qwen2_moe", None, dict(expert=4, data=2), Adapter),
        ("qwen3_moe", None, dict(fsdp=4, tensor=2), Adapter),
        ("qwen3_moe", "nf4", dict(expert=2, fsdp=2, tensor=2), Adapter),
        ("qwen3_moe", NF4(double_quant=True), dict(expert=2, fsdp=2, tensor=2), Adapter),
        ("gpt_oss", None, dict(expert=8), Adapter),
        ("gpt_oss", "int8", dict(expert=2, fsdp=2, tensor=2), Adapter),
        ("gpt_oss", None, dict(expert=2, fsdp=2, tensor=2), nnx.Param),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_one_device(directories, name, form, mesh, trained_type):
    loss, gradient = gradients(directories[name], form, make_mesh(mesh), trained_type)
    expected_loss, expected = gradients(directories[name], form, None, trained_type)
    assert loss == pytest.approx(expected_loss, rel=2e-6)
    for name, value in gradient.items():
        error = np.linalg.norm(value - expected[name]) / np.linalg.norm(expected[name])
        assert error < 2e-5, f"{name}: relative error {error:.1e}"


def test_rows_that_do_not_divide(directories):
    tokens = np.random.default_rng(0).integers(0, 96, (3, 12), dtype=np.int32)
    expected = jaxft.load_model(directories["qwen3_moe"])(tokens)
    model = jaxft.load_model(directories["qwen3_moe"], mesh=make_mesh(dict(expert=4, fsdp=2)))
    np.testing.assert_allclose(jax.jit(lambda m, t: m(t))(model, tokens), expected, atol=2e-5)


@pytest.mark.parametrize(
    "model, message",
    [
        (MODELS["qwen3_moe"] | dict(model_type="qwen3_moe", num_experts=12), "evenly, of 12 experts in a layer"),
        (SIZES | dict(model_type="llama"), "but this model has none; use data or fsdp"),
    ],
)
def test_experts_that_cannot_be_shared_out(model, message):
    with pytest.raises(ValueError, match=f"mesh: expert=8 shares out experts.*{message}"):
        check_mesh(decoder_config(model), make_mesh(dict(expert=8)))
