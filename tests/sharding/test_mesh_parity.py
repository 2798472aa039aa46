"""Every mesh gives the single-device loss and gradients, and moves codes, never dequantized weights."""

import re

import jax
import numpy as np
import pytest

import jaxft
from jaxft.adapters.attach import attach
from jaxft.adapters.targets import LoraConfig
from jaxft.config import Config
from jaxft.data.batch import Batch
from jaxft.models.linear import Adapter
from jaxft.objectives.sft import Sft
from jaxft.sharding.mesh import batch_sharding, make_mesh
from jaxft.training.optimizer import make_optimizer
from jaxft.training.state import Partition
from jaxft.training.step import initial_state, make_train_step, tally

MESHES = {
    "data8": dict(data=8),
    "fsdp8": dict(fsdp=8),
    "tensor2-fsdp4": dict(tensor=2, fsdp=4),
    "data2-fsdp2-tensor2": dict(data=2, fsdp=2, tensor=2),
}
FORMATS = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8": ("float32", "int8"),
    "nf4": ("float32", "nf4"),
}
LAYERS, HIDDEN, INNER = 3, 512, 1024
MODEL = dict(
    model_type="mistral", vocab_size=160, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
    num_attention_heads=8, num_key_value_heads=4, head_dim=64, sliding_window=9, rms_norm_eps=1e-5,
    tie_word_embeddings=False, max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def directory(random_checkpoint):
    return random_checkpoint(MODEL)


def packed_batch(rows: int = 8, length: int = 24) -> Batch:
    """Two examples to a row, some rows with padding at the end."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 160, (rows, length), dtype=np.int32)
    segments = np.repeat([[1, 2]], length // 2, axis=1).repeat(rows, axis=0).astype(np.int32)
    segments[rows // 2 :, -3:] = 0
    positions = np.tile(np.arange(length // 2, dtype=np.int32), (rows, 2))
    return Batch(tokens, rng.random((rows, length)) < 0.7, segments, positions)


def prepared(directory, form: str, mesh):
    """Partition, trained and frozen arrays of a model with a DoRA whose B is not zero."""
    dtype, quantization = FORMATS[form]
    base = jaxft.load_model(directory, dtype, quantization, mesh)
    model = attach(base, LoraConfig(r=4, lora_alpha=8, use_dora=True), jax.random.key(1))
    partition = Partition(model, Adapter)
    trained, frozen = partition.split(model)
    return partition, {name: a + 0.02 if name.endswith(".B") else a for name, a in trained.items()}, frozen


def gradients(directory, form: str, mesh):
    partition, trained, frozen = prepared(directory, form, mesh)
    batch = packed_batch()
    if mesh is not None:
        batch = jax.device_put(batch, batch_sharding(mesh))

    @jax.jit
    def run(trained, frozen, batch):
        def loss(trained):
            return tally(partition.join(trained, frozen), Adapter, Sft(), batch, None)[:2]

        return jax.value_and_grad(loss, has_aux=True)(trained)

    (total, count), gradient = run(trained, frozen, batch)
    return float(total) / float(count), jax.tree.map(np.asarray, gradient)


@pytest.fixture(scope="module")
def single_device(directory):
    return {form: gradients(directory, form, None) for form in FORMATS}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("mesh", MESHES)
def test_loss_and_gradients_are_those_of_one_device(directory, single_device, form, mesh):
    loss, gradient = gradients(directory, form, make_mesh(MESHES[mesh]))
    expected_loss, expected = single_device[form]
    # bfloat16 sums rounded in another order differ by a few units of its last place, 2**-8.
    tolerance = 2e-2 if form == "bfloat16" else 2e-5
    assert loss == pytest.approx(expected_loss, rel=tolerance / 10)
    for name, value in gradient.items():
        error = np.linalg.norm(value - expected[name]) / np.linalg.norm(expected[name])
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("form", ["int8", "nf4"])
@pytest.mark.parametrize("mesh", MESHES)
def test_no_dequantized_weight_crosses_devices(directory, form, mesh):
    """Collectives of floats, but of activations, are smaller than a quarter of the smallest projection FSDP cuts."""
    mesh = make_mesh(MESHES[mesh])
    partition, trained, frozen = prepared(directory, form, mesh)
    config = Config(model_name_or_path="m", output_dir="o", datasets=[{"path": "d"}])
    optimizer = make_optimizer(config, 10, partition.names)
    state = initial_state(trained, optimizer, mesh)
    step = make_train_step(partition, Sft(), optimizer, state)
    batch = jax.device_put(jax.tree.map(lambda x: x[None], packed_batch()), batch_sharding(mesh, leading=1))
    text = step.lower(state, frozen, batch).compile().as_text()
    moved = re.findall(r"= \(?(\w+)\[([\d,]*)\]\S* (all-gather|collective-permute|all-to-all)", text)
    if mesh.shape["fsdp"] > 1:
        assert any(kind in ("s8", "u8") and count(shape) >= HIDDEN * 256 // 4 for kind, shape, _ in moved)
    vocabulary, tokens = count(f"160,{HIDDEN}"), str(batch.tokens.shape[-1])
    smallest = 256 * HIDDEN // mesh.shape["tensor"]
    for kind, shape, name in moved:
        of_weights = count(shape) != vocabulary // mesh.shape["tensor"] and tokens not in shape.split(",")
        floats = kind in ("f32", "bf16", "f16") and of_weights
        assert not floats or count(shape) < smallest // 4, f"{name} of {kind}[{shape}]"


def count(shape: str) -> int:
    return int(np.prod([int(size) for size in shape.split(",") if size]))


@pytest.mark.parametrize("mesh", ["fsdp8", "data2-fsdp2-tensor2"])
def test_state_keeps_its_place_and_the_step_compiles_once(directory, mesh):
    mesh = make_mesh(MESHES[mesh])
    partition, trained, frozen = prepared(directory, "nf4", mesh)
    config = Config(model_name_or_path="m", output_dir="o", datasets=[{"path": "d"}])
    optimizer = make_optimizer(config, 10, partition.names)
    state = initial_state(trained, optimizer, mesh)
    step = make_train_step(partition, Sft(), optimizer, state)
    batch = jax.device_put(jax.tree.map(lambda x: x[None], packed_batch()), batch_sharding(mesh, leading=1))
    places = jax.tree.map(lambda x: x.sharding, state)
    for _ in range(3):
        state, _ = step(state, frozen, batch)
    assert jax.tree.map(lambda x: x.sharding, state) == places
    assert step._cache_size() == 1
    adapter = "model.layers.0.0.mlp.up_proj.adapter.B"
    assert len(state.trained[adapter].sharding.device_set) == 8
    assert state.trained[adapter].addressable_shards[0].data.size < state.trained[adapter].size


def test_full_training_on_a_mesh(directory):
    """Every weight trained: the gradients of a sharded base are those of one device too."""
    from flax import nnx

    def run(mesh):
        model = jaxft.load_model(directory, mesh=mesh)
        partition = Partition(model, nnx.Param)
        trained, frozen = partition.split(model)
        batch = packed_batch() if mesh is None else jax.device_put(packed_batch(), batch_sharding(mesh))
        grad = jax.jit(jax.grad(lambda t, f, b: tally(partition.join(t, f), nnx.Param, Sft(), b, None)[0]))
        return jax.tree.map(np.asarray, grad(trained, frozen, batch))

    expected = run(None)
    for name, value in run(make_mesh(MESHES["data2-fsdp2-tensor2"])).items():
        error = np.linalg.norm(value - expected[name]) / np.linalg.norm(expected[name])
        assert error < 2e-5, f"{name}: relative error {error:.1e}"
