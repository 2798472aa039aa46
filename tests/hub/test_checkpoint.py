"""Model directories against the safetensors library and transformers, and directories that are not what they seem."""

import json
import os
import weakref
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxft.hub.checkpoint import Checkpoint, write_checkpoint
from jaxft.hub.safetensors import SafetensorsError, SafetensorsFile
from jaxft.hub.safetensors_writer import write_safetensors

RNG = np.random.default_rng(8)


@pytest.fixture
def sharded(tmp_path) -> tuple[Path, dict[str, np.ndarray]]:
    """A checkpoint in three shards, and what it was made of."""
    arrays = {f"model.layers.{i}.weight": RNG.standard_normal((4, i + 1)).astype(np.float32) for i in range(6)}
    arrays["lm_head.weight"] = RNG.standard_normal((100, 3)).astype(ml_dtypes.bfloat16)
    directory = tmp_path / "model"
    directory.mkdir()
    write_checkpoint(directory, arrays, arrays.__getitem__, max_shard_bytes=200)
    return directory, arrays


def edit_index(directory: Path, edit) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def keys_of(path: Path) -> list[str]:
    """The names in a file, as the safetensors library sees it."""
    with safetensors.safe_open(path, framework="np") as file:
        return list(file.keys())


# Reading and writing


@pytest.mark.parametrize("model", ["stories260K", "stories15M"])
def test_real_models(material, model):
    directory = material / "models" / model
    reference = safetensors.numpy.load_file(directory / "model.safetensors")
    with Checkpoint.open(directory) as checkpoint:
        assert sorted(checkpoint.names()) == sorted(reference)
        for name, array in reference.items():
            assert checkpoint.info(name).shape == array.shape
            np.testing.assert_array_equal(checkpoint.read(name), array, strict=True)
            checkpoint.release(name)


def test_sharded_checkpoint(sharded):
    directory, arrays = sharded
    # 16 + 32 + 48 + 64 | 80 + 96 | 600 bytes, the last over the limit by itself
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(os.listdir(directory)) == [*shards, "model.safetensors.index.json"]
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(a.nbytes for a in arrays.values())}
    assert [len(keys_of(directory / shard)) for shard in shards] == [4, 2, 1]
    assert index["weight_map"] == {name: shard for shard in shards for name in keys_of(directory / shard)}
    with Checkpoint.open(directory) as checkpoint:
        assert checkpoint.names() == tuple(arrays)
        assert checkpoint.metadata == {"format": "pt"}
        for name, array in arrays.items():
            np.testing.assert_array_equal(checkpoint.read(name), array, strict=True)
            np.testing.assert_array_equal(checkpoint.read(name, (slice(1, 3),)), array[1:3], strict=True)
        with pytest.raises(SafetensorsError, match=r"no tensor 'layer.3.weight'.*model.layers.3.weight"):
            checkpoint.read("layer.3.weight")


def test_one_shard_needs_no_index(tmp_path):
    arrays = {"a": np.ones(3), "b": np.zeros((2, 2), np.int8)}
    written = write_checkpoint(tmp_path, arrays, arrays.__getitem__, stem="adapter_model", max_shard_bytes=28)
    assert written == [tmp_path / "adapter_model.safetensors"]
    assert os.listdir(tmp_path) == ["adapter_model.safetensors"]
    assert Checkpoint.open(tmp_path, stem="adapter_model").names() == ("a", "b")


def test_a_tensor_over_the_limit_is_its_own_shard(tmp_path):
    arrays = {name: np.ones(size) for name, size in (("big", 9), ("a", 1), ("b", 1), ("huge", 20), ("c", 1))}
    write_checkpoint(tmp_path, arrays, arrays.__getitem__, max_shard_bytes=16)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [list(SafetensorsFile(shard).tensors) for shard in shards] == [
        ["big"],
        ["a", "b"],
        ["huge"],
        ["c"],
    ]


@pytest.mark.parity
def test_transformers_loads_the_shards(tmp_path, material):
    import torch
    from transformers import AutoModelForCausalLM

    source = material / "models" / "stories260K"
    with Checkpoint.open(source) as checkpoint:
        specs = {name: checkpoint.info(name) for name in checkpoint.names()}
        written = write_checkpoint(tmp_path, specs, checkpoint.read, max_shard_bytes=200_000)
    assert len(written) > 3
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    ours, reference = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path, source))
    assert ours.keys() == reference.keys()
    assert all(torch.equal(ours[name], reference[name]) for name in reference)


def test_writer_holds_one_tensor_at_a_time(tmp_path):
    made = []
    specs = {f"t{i}": jax.ShapeDtypeStruct((10 + i,), jnp.float32) for i in range(5)}

    class Tracked(np.ndarray):
        pass

    def produce(name: str) -> np.ndarray:
        assert all(tensor() is None for tensor in made), "a tensor before this one is still held"
        array = np.full(specs[name].shape, int(name[1:]), np.float32).view(Tracked)
        made.append(weakref.ref(array))
        return array

    write_checkpoint(tmp_path, specs, produce, max_shard_bytes=100)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert [checkpoint.read(f"t{i}").sum() for i in range(5)] == [i * (10 + i) for i in range(5)]


def test_closing_closes_every_shard(sharded):
    directory, arrays = sharded
    checkpoint = Checkpoint.open(directory)
    checkpoint.close()
    for name in arrays:
        for use in (checkpoint.read, checkpoint.release):
            with pytest.raises(SafetensorsError, match="after close"):
                use(name)


# Directories that are damaged, or hold something else


@pytest.mark.parametrize("shard", [
    "../secret.safetensors", "/etc/hostname", "/etc/x.safetensors", "sub/x.safetensors", "..", "", 5, None,
    "pytorch_model-00001-of-00002.bin", "a\\b.safetensors", ".safetensors",
])  # fmt: skip
def test_index_may_name_only_files_beside_it(sharded, shard):
    directory, _ = sharded
    secret = {"lm_head.weight": np.ones(1, np.float32)}
    write_safetensors(directory.parent / "secret.safetensors", secret, secret.__getitem__)
    edit_index(directory, lambda index: index["weight_map"].update({"lm_head.weight": shard}))
    with pytest.raises(SafetensorsError, match=r"index\.json: 'lm_head.weight': .* bare name"):
        Checkpoint.open(directory)


def test_index_must_equal_its_shards(sharded):
    directory, _ = sharded
    index = (directory / "model.safetensors.index.json").read_bytes()
    edit_index(directory, lambda index: index["weight_map"].pop("model.layers.4.weight"))
    with pytest.raises(SafetensorsError, match=r"00002-of-00003.* only the shard has model.layers.4.we"):
        Checkpoint.open(directory)
    extra = {f"ghost.{i}": "model-00001-of-00003.safetensors" for i in range(8)}
    edit_index(directory, lambda index: index["weight_map"].update(extra))
    with pytest.raises(SafetensorsError, match=r"00001-of-00003.* only the index has ghost.0, .*and 3 more"):
        Checkpoint.open(directory)
    (directory / "model.safetensors.index.json").write_bytes(index)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(SafetensorsError, match=r"model-00002-of-00003.safetensors: no such file"):
        Checkpoint.open(directory)


@pytest.mark.parametrize("text, told", [
    ("{}", "no weight_map"),
    ('{"weight_map": {}}', "no weight_map"),
    ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' appears twice"),
    ("[]", "not a JSON object"),
    ("", "not valid JSON"),
])  # fmt: skip
def test_damaged_index(tmp_path, text, told):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(SafetensorsError, match=rf"model\.safetensors\.index\.json: .*{told}"):
        Checkpoint.open(tmp_path)


def test_index_beside_a_single_file(sharded):
    directory, _ = sharded
    (directory / "model-00001-of-00003.safetensors").rename(directory / "model.safetensors")
    with pytest.raises(SafetensorsError, match="two sets of weights"):
        Checkpoint.open(directory)
    names = keys_of(directory / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(Checkpoint.open(directory).names()) == set(names)


def test_directories_without_weights(tmp_path):
    with pytest.raises(SafetensorsError, match="nowhere: no such directory"):
        Checkpoint.open(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SafetensorsError, match=r"neither model.safetensors nor .*, but config.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(SafetensorsError, match=r"shards model-00001-of-00002.safetensors without .*index"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(SafetensorsError, match=r"model.safetensors: no such file"):
        Checkpoint.open(tmp_path)


@pytest.mark.parity
def test_pickles_are_refused_with_a_conversion_that_works(tmp_path, monkeypatch):
    import torch

    weights = {f"layer.{i}": torch.randn(3, 4).to(torch.bfloat16) for i in range(4)}
    for part, names in (("00001", ["layer.0", "layer.1"]), ("00002", ["layer.2", "layer.3"])):
        torch.save({name: weights[name] for name in names}, tmp_path / f"pytorch_model-{part}-of-00002.bin")
    torch.save({"lr": 1.0}, tmp_path / "training_args.bin")
    with pytest.raises(SafetensorsError, match="only as pickles") as caught:
        Checkpoint.open(tmp_path)
    recipe = "\n".join(line[4:] for line in str(caught.value).splitlines() if line.startswith("    "))
    assert "training_args" not in recipe
    assert "weights_only=True" in recipe
    monkeypatch.chdir(tmp_path)
    exec(recipe, {})
    with Checkpoint.open(tmp_path) as checkpoint:
        for name, tensor in weights.items():
            np.testing.assert_array_equal(checkpoint.read(name).astype(np.float32), tensor.float().numpy())


# Writing that fails


@pytest.mark.parametrize("existing", [{}, {"x.safetensors": b"old"}])
def test_a_failed_write_leaves_what_was_there(tmp_path, snapshot, failing_write, existing):
    specs, produce, error, told = failing_write
    for name, content in existing.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=told):
        write_checkpoint(tmp_path, specs, produce, max_shard_bytes=24)
    assert snapshot(tmp_path) == existing


def test_what_cannot_be_written_is_told_before_anything_is(tmp_path, snapshot, impossible_write):
    specs, produce, options, told = impossible_write
    with pytest.raises((SafetensorsError, OSError), match=told):
        write_checkpoint(tmp_path, specs, produce, **options)
    assert snapshot(tmp_path) == {}


def test_disk_must_hold_all_shards_together(tmp_path, snapshot, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda directory: SimpleNamespace(free=500))
    arrays = {"a": np.ones(25), "b": np.ones(25), "c": np.ones(25)}
    with pytest.raises(OSError, match="600 bytes are to be written, the disk has 500 free"):
        write_checkpoint(tmp_path, arrays, arrays.__getitem__, max_shard_bytes=200)
    assert snapshot(tmp_path) == {}


def test_a_checkpoint_is_not_written_over_another(sharded, snapshot):
    directory, arrays = sharded
    before = snapshot(directory)
    with pytest.raises(SafetensorsError, match=r"already holds model-00001-of-00003.safetensors"):
        write_checkpoint(directory, arrays, arrays.__getitem__)
    assert snapshot(directory) == before
    with pytest.raises(SafetensorsError, match="no tensors"):
        write_checkpoint(directory, {}, arrays.__getitem__, stem="other")


def test_file_permissions_follow_the_umask(tmp_path):
    write_checkpoint(tmp_path, {"a": np.ones(2)}, lambda name: np.ones(2))
    (tmp_path / "plain").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
