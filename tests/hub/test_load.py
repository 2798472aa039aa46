"""What is said of a directory or an argument that makes no model."""

import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jaxft.generation.generate import generate
from jaxft.hub.checkpoint import Checkpoint, write_checkpoint
from jaxft.hub.load import eos_token_ids, load_model, read_json
from jaxft.sharding.mesh import make_mesh


@pytest.mark.parametrize("dtype", ["int8", "float16", "float64", "nonsense"])
def test_weights_are_stored_in_one_of_two_dtypes(chat_model, dtype):
    with pytest.raises(ValueError, match=f"dtype is '{dtype}'.* float32 or bfloat16"):
        load_model(chat_model(), dtype)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("declared", ["x", [0, "x"], 1.5, True, {"id": 1}])
def test_ids_that_end_a_text_are_numbers(chat_model, tmp_path, name, declared):
    directory = tmp_path / "model"
    shutil.copytree(chat_model(), directory)
    (directory / "generation_config.json").unlink()
    settings = json.loads((directory / "config.json").read_text()) | {"eos_token_id": declared}
    (directory / name).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"model/{name}: eos_token_id must be a token id or a list"):
        eos_token_ids(directory, 3)
    (directory / name).write_text(json.dumps(settings | {"eos_token_id": [7, 5]}))
    assert eos_token_ids(directory, 3) == [3, 5, 7]
    assert eos_token_ids(directory, None) == [5, 7]


@pytest.mark.parametrize(
    "name, reason",
    [
        ("config.json", "; .*/gone is not the directory of a model"),
        ("adapter_config.json", "; .*/gone is not the directory of a PEFT adapter"),
        ("run.json", ""),
    ],
)
def test_a_missing_file_says_what_its_directory_is_not(tmp_path, name, reason):
    with pytest.raises(ValueError, match=f"gone/{name}: no such file{reason}$"):
        read_json(tmp_path / "gone" / name)


@pytest.mark.parametrize(
    "data, reason", [(b"{", "not valid JSON"), (b"\xff", "not valid JSON"), (b"[1]", "holds a list, not an object")]
)
def test_a_file_that_holds_no_object(tmp_path, data, reason):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"config\.json: {reason}"):
        read_json(path)


def changed(source: Path, directory: Path, change) -> Path:
    """A copy of a model directory with its tensors changed."""
    shutil.copytree(source, directory)
    (directory / "model.safetensors").unlink()
    with Checkpoint.open(source) as files:
        tensors = {name: np.array(files.read(name)) for name in files.names()}
    change(tensors)
    write_checkpoint(directory, tensors, tensors.__getitem__)
    return directory


TOKENS = np.arange(6, dtype=np.int32)[None]


def test_a_head_in_the_files_decides_whether_it_is_tied(chat_model, tmp_path):
    source = chat_model(tie_word_embeddings=True)
    embedding = "model.embed_tokens.weight"
    same = changed(source, tmp_path / "same", lambda t: t.update({"lm_head.weight": t[embedding]}))
    np.testing.assert_array_equal(load_model(same)(TOKENS), load_model(source)(TOKENS))
    assert load_model(same).lm_head is None
    other = changed(source, tmp_path / "other", lambda t: t.update({"lm_head.weight": 2 * t[embedding]}))
    np.testing.assert_allclose(load_model(other)(TOKENS), 2 * load_model(source)(TOKENS), rtol=1e-5)
    wrong = changed(source, tmp_path / "wrong", lambda t: t.update({"lm_head.weight": t[embedding][:5]}))
    with pytest.raises(ValueError, match=r"1 of another shape: lm_head.weight is \(5, 32\)"):
        load_model(wrong)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, ml_dtypes.float8_e4m3fn])
def test_codes_are_no_values(chat_model, tmp_path, dtype):
    name = "model.layers.1.mlp.up_proj.weight"
    directory = changed(chat_model(), tmp_path / "m", lambda t: t.update({name: t[name].astype(dtype)}))
    with pytest.raises(ValueError, match=rf"1 no values but codes.*quantization_config.*: {name} \({np.dtype(dtype)}"):
        load_model(directory)


@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "tensor": 2}])
def test_codes_by_columns_are_the_same_codes(chat_model, monkeypatch, mesh):
    """As on a TPU, which wants them so: in memory they are transposed, and every function takes them as they are."""
    mesh = mesh and make_mesh(mesh, jax.devices()[:4])
    tokens = np.random.default_rng(0).integers(0, 32, (4, 8)).astype(np.int32)
    directory, models = chat_model(), {}
    for platforms in ({"tpu"}, {"cpu"}):
        monkeypatch.setattr("jaxft.sharding.layout.TRANSPOSED_ON", platforms)
        models[platforms.pop()] = load_model(directory, "float32", "nf4", mesh)
    plain, transposed = models["tpu"], models["cpu"]
    codes = transposed.model.layers[0][0].mlp.up_proj.weight.get_value().codes
    assert codes.format.layout.major_to_minor == (0, 2, 1)
    assert codes.sharding == plain.model.layers[0][0].mlp.up_proj.weight.get_value().codes.sharding
    chex.assert_trees_all_equal(*(nnx.to_pure_dict(nnx.state(model)) for model in (plain, transposed)))

    @jax.jit
    def loss(h, model):
        return jnp.sum(model.unembed(model.hidden(tokens) * h) ** 2)

    for model in (plain, transposed):
        model.remat = "full"
    expected, found = (jax.value_and_grad(loss)(jnp.float32(1.0), model) for model in (plain, transposed))
    chex.assert_trees_all_close(found, expected, rtol=1e-5)
    written = [generate(model, [tokens[0]], max_new_tokens=4, eos_ids=[]) for model in (plain, transposed)]
    assert written[0] == written[1]
