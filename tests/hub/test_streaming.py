"""Loading in the order of the files, ahead of the devices: the values, the bound on memory, and failures."""

import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxft.hub import stream
from jaxft.hub.checkpoint import Checkpoint, write_checkpoint
from jaxft.hub.load import load_model
from jaxft.hub.stream import read_ahead
from jaxft.models.decoder import describe, parameters
from jaxft.models.hf_config import decoder_config
from jaxft.quantization.integer import Int4, Int8
from jaxft.quantization.nf4 import NF4
from jaxft.quantization.qtensor import quantize

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 83,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 96,
    "n_positions": 64,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "layer_norm_epsilon": 1e-5,
}


def declared(config: dict) -> list:
    return [parameter for parameter, _ in parameters(describe(decoder_config(config)))]


def write_shuffled(directory: Path, config: dict, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Random tensors, in no order, about three to a shard."""
    rng = np.random.default_rng(3)
    tensors = {
        name: (0.1 * rng.standard_normal(parameter.stored_shape, np.float32)).astype(dtype)
        for parameter in declared(config)
        for name in parameter.names
    }
    names = sorted(tensors)
    rng.shuffle(names)
    (directory / "config.json").write_text(json.dumps(config))
    largest = max(tensor.nbytes for tensor in tensors.values())
    write_checkpoint(
        directory, {name: tensors[name] for name in names}, tensors.__getitem__, max_shard_bytes=2 * largest
    )
    return tensors


def bits(array: jax.Array) -> np.ndarray:
    array = np.asarray(array)
    return array.astype(np.int8) if array.itemsize == 1 else array.view(f"u{array.itemsize}")


@pytest.mark.parametrize(
    "config, stored, form",
    [
        pytest.param(LLAMA, np.float32, None, id="bfloat16"),
        pytest.param(GPT2, ml_dtypes.bfloat16, Int8(), id="int8"),
        pytest.param(GPT2, np.float32, Int4(), id="int4"),
        pytest.param(LLAMA, ml_dtypes.bfloat16, Int4(7), id="int4-odd-width"),
        pytest.param(LLAMA, ml_dtypes.bfloat16, NF4(), id="nf4"),
        pytest.param(LLAMA, np.float32, NF4(double_quant=True), id="nf4-double", marks=pytest.mark.slow),
    ],
)
def test_every_value_arrives_in_its_place(tmp_path, monkeypatch, config, form, stored):
    monkeypatch.setattr(stream, "PIECE", 1000)
    monkeypatch.setattr(stream, "AHEAD", 3000)
    tensors = write_shuffled(tmp_path, config, np.dtype(stored))
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    model = load_model(tmp_path, "bfloat16", form)
    for parameter, variable in parameters(model):
        stack = np.stack([tensors[name] for name in parameter.names])
        stack = (stack.swapaxes(-1, -2) if parameter.transposed else stack).reshape(parameter.stacked_shape)
        if form is not None and parameter.name.endswith("_proj.weight"):
            expected = quantize(jnp.asarray(stack), form)
        else:
            expected = stack.astype(ml_dtypes.bfloat16)
        found = variable.get_value()
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), parameter.name
            np.testing.assert_array_equal(bits(ours), bits(theirs), err_msg=parameter.name)


# Reading ahead


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("jaxft-read")]


def test_results_come_in_order_and_the_bytes_on_the_way_are_bounded():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 60, 200).tolist()
    sizes[70] = 250  # more than the limit: alone
    lock, begun, worst = threading.Lock(), 0, []

    def read(item: int, stopped: threading.Event) -> int:
        nonlocal begun
        with lock:
            begun += 1
        return -item

    ahead = read_ahead(read, range(200), sizes, 100)
    for number, result in enumerate(ahead):
        assert result == -number
        with lock:
            on_the_way = sum(sizes[number:begun])
            worst.append(on_the_way)
            assert on_the_way <= max(100, sizes[number])
    assert max(worst) > 60
    assert not readers()


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ValueError("damaged")])
def test_an_error_in_a_thread_is_raised_where_the_tensor_is_missed(error):
    def read(item: int, stopped: threading.Event) -> int:
        if item == 3:
            raise error
        return item

    ahead, got = read_ahead(read, range(100), [1] * 100, 5), []
    with pytest.raises(type(error)) as raised:
        got.extend(ahead)
    assert raised.value is error
    assert got == [0, 1, 2]
    assert not readers()


def test_an_interrupt_stops_the_threads(tmp_path, monkeypatch):
    write_shuffled(tmp_path, LLAMA, np.dtype(np.float32))
    add, count = stream.add_tensor, 0

    def interrupted(*arguments):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return add(*arguments)

    monkeypatch.setattr(stream, "add_tensor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_model(tmp_path)
    assert not readers()


def test_a_tensor_that_cannot_be_read_fails_the_load(tmp_path, monkeypatch):
    write_shuffled(tmp_path, LLAMA, np.dtype(np.float32))
    read, error = Checkpoint.read, OSError(5, "Input/output error")
    name = "model.layers.1.mlp.up_proj.weight"

    def failing(self, asked, index=None):
        if asked == name and index is not None:
            raise error
        return read(self, asked, index)

    monkeypatch.setattr(Checkpoint, "read", failing)
    with pytest.raises(OSError) as raised:
        load_model(tmp_path)
    assert raised.value is error
    assert not readers()


def test_nothing_is_printed_where_nobody_watches(tmp_path, capfd):
    write_shuffled(tmp_path, LLAMA, np.dtype(np.float32))
    load_model(tmp_path)
    assert capfd.readouterr() == ("", "")


# Memory


def write_sparse(directory: Path, config: dict, shard_bytes: int) -> None:
    """A bfloat16 checkpoint of zeros that takes no disk."""
    (directory / "config.json").write_text(json.dumps(config))
    sizes = {name: parameter.stored_shape for parameter in declared(config) for name in parameter.names}
    shards, room = [{}], shard_bytes
    for name in sorted(sizes):
        nbytes = 2 * int(np.prod(sizes[name]))
        if nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = nbytes
        room -= nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        path = directory / f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, offset = {}, 0
        for name, nbytes in shard.items():
            header[name] = {"dtype": "BF16", "shape": sizes[name], "data_offsets": [offset, offset + nbytes]}
            offset += nbytes
            weight_map[name] = path.name
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, path.stat().st_size + offset)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see resident memory")
MEASURED = """
    import sys
    import jax
    import jaxft
    import jaxft.cli.train  # and all libraries, which are imported where they are first needed
    from jaxft.models.decoder import parameters
    from jaxft.quantization.qtensor import QTensor

    def resident(field):
        with open("/proc/self/status") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))

    jax.numpy.zeros(()).block_until_ready()
    before = resident("VmRSS")
    {action}
    values = [variable.get_value() for _, variable in parameters(model)]
    print(resident("VmHWM") - before - sum(value.nbytes for value in values))
"""


def over(action: str, *arguments: str) -> int:
    """The peak of resident memory, beyond the model that `action` makes and what the process held before."""
    code = textwrap.dedent(MEASURED).format(action=textwrap.dedent(action))
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


DEEP = LLAMA | {"vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 80}
LARGEST = 2 * 1024 * 4096  # bytes; a stack of 80 has 670 MB


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("dtype, quantization", [("bfloat16", "int8"), ("float32", None)])
def test_a_deep_model_takes_its_own_memory_and_little_more(tmp_path, dtype, quantization):
    write_sparse(tmp_path, DEEP, 200_000_000)
    action = f"model = jaxft.load_model(sys.argv[1], {dtype!r}, {quantization!r})"
    assert over(action, str(tmp_path)) < 2 * LARGEST + 500_000_000


@pytest.mark.slow
@needs_proc
def test_a_model_of_8b_shapes_takes_its_own_memory_and_two_tensors(tmp_path, material):
    path = material / "configs" / "meta-llama--Meta-Llama-3.1-8B_config.json"
    config = json.loads(path.read_text()) | {"num_hidden_layers": 3}
    write_sparse(tmp_path, config, 500_000_000)
    largest = 2 * config["vocab_size"] * config["hidden_size"]
    action = "model = jaxft.load_model(sys.argv[1], 'bfloat16', 'nf4')"
    assert over(action, str(tmp_path)) < 2 * largest + 500_000_000


@pytest.mark.slow
@needs_proc
def test_merging_and_saving_take_little_beside_the_model(tmp_path):
    write_sparse(tmp_path, DEEP | {"num_hidden_layers": 40}, 200_000_000)
    action = """
        from jaxft.adapters.attach import attach
        from jaxft.adapters.targets import LoraConfig
        model = jaxft.load_model(sys.argv[1], "bfloat16")
        model = attach(model, LoraConfig(r=1, lora_alpha=2), jax.random.key(0))
        model = jaxft.merge_adapter(model, donate=True)
        jaxft.save_model(model, sys.argv[2], max_shard_bytes=300_000_000)
    """
    assert over(action, str(tmp_path), str(tmp_path / "saved")) < 2 * LARGEST + 500_000_000
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 3
