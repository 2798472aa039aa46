"""A run goes on elsewhere: on another number of devices, or for longer, it is still the run that was started."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxft.cli.train import main
from jaxft.config_file import load_config
from jaxft.sharding.mesh import make_mesh
from jaxft.training import inputs
from jaxft.training.logging import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compiles")

STEPS, LEFT_AT = 8, 4
KINDS = {
    "packed": {"packing": True, "lora_dropout": 0.2},
    "unpacked, mixed": {"packing": False, "lora_dropout": 0.2, "datasets": "mixed"},
}


@pytest.fixture
def devices(monkeypatch):
    """`devices(4)`: the next run sees four."""

    def see(count: int) -> None:
        monkeypatch.setattr(inputs, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:count]))

    return see


@pytest.fixture(scope="module")
def config(chat_model, write_chats, tmp_path_factory):
    """`config(**changes)`: the file of a run whose updates have four rows, on four devices."""
    directory = tmp_path_factory.mktemp("moving")
    data = [str(write_chats(directory / f"{n}.jsonl", n, seed=n)) for n in (40, 25)]
    model = str(chat_model())

    def make(**changes) -> Path:
        settings = {
            "model_name_or_path": model,
            "output_dir": "replaced",
            "dtype": "float32",
            "remat": "none",
            "lora_r": 4,
            "lora_target_modules": ["q_proj", "down_proj"],
            "max_length": 48,
            "micro_batch_size": 1,
            "learning_rate": 0.02,
            "max_steps": STEPS,
            "save_steps": LEFT_AT,
            "save_total_limit": 9,
            "logging_steps": 1,
        }
        settings |= {"datasets": data[:1]} | changes
        if settings["datasets"] == "mixed":
            settings["datasets"] = [
                {"path": path, "weight": weight} for path, weight in zip(data, (1.0, 2.0), strict=True)
            ]
        path = directory / f"{len(list(directory.iterdir()))}.yaml"
        path.write_text(load_config(settings).to_yaml())
        return path

    return make


def run(config: Path, directory: Path, *words: str) -> int:
    return main(["--config", str(config), f"output_dir={directory}", "resume_from_checkpoint=true", *words])


def left(whole: Path, directory: Path) -> Path:
    """The run as it was after `LEFT_AT` updates."""
    shutil.copytree(whole, directory)
    shutil.rmtree(directory / "adapter")
    shutil.rmtree(directory / "checkpoints" / str(STEPS))
    return directory


def curve(directory: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(directory / "metrics.jsonl") if "loss" in record]


def adapter(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_as_many_rows_per_update_are_the_same_run(config, devices, tmp_path, capsys, kind):
    """From four devices to two with more rows or more micro-batches, to one, and back."""
    settings, whole = config(**KINDS[kind]), tmp_path / "whole"
    devices(4)
    assert run(settings, whole) == 0
    for count, words in {
        2: ["micro_batch_size=2"],
        1: ["gradient_accumulation_steps=2", "micro_batch_size=2"],
        4: ["mesh.fsdp=2", "mesh.data=1", "mesh.tensor=2", "gradient_accumulation_steps=2"],
    }.items():
        moved = left(whole, tmp_path / str(count))
        devices(count)
        capsys.readouterr()
        assert run(settings, moved, *words) == 0
        warned = capsys.readouterr().err.splitlines()
        for key in (word.partition("=")[0] for word in words):
            assert any(f"resumed with another {key} (" in line and "up to rounding" in line for line in warned)
        np.testing.assert_allclose(curve(moved), curve(whole), rtol=2e-6)
        for name, array in adapter(whole).items():
            np.testing.assert_allclose(adapter(moved)[name], array, rtol=1e-3, atol=2e-6)
    assert len(curve(whole)) == STEPS

    moved = left(whole, tmp_path / "other rows")
    devices(2)
    before = (moved / "run.json").read_text()
    for words, advice in {
        (): "4 -> 2; 4 rows on 2 groups (data x fsdp x expert) are micro_batch_size: 1 with "
        "gradient_accumulation_steps: 2, or another pair whose product is 2",
        ("micro_batch_size=3",): "4 -> 6; 4 rows on 2 groups (data x fsdp x expert) are micro_batch_size: 1 with",
        ("micro_batch_size=4", "mesh.tensor=2", "mesh.data=1", "gradient_accumulation_steps=2"): "micro_batch_size: 4 "
        "with gradient_accumulation_steps: 1, or another pair whose product is 4",
    }.items():
        capsys.readouterr()
        assert run(settings, moved, *words) == 2
        error = capsys.readouterr().err
        assert "the rows of an update changed: 4 -> " in error
        assert advice in error
    devices(3)
    capsys.readouterr()
    assert run(settings, moved) == 2
    assert (
        "4 rows cannot be shared out among 3 groups (data x fsdp x expert): take another mesh"
        in capsys.readouterr().err
    )
    assert (moved / "run.json").read_text() == before


@pytest.mark.slow
def test_a_finished_run_can_be_made_longer_but_not_shorter(config, devices, tmp_path, capsys):
    devices(1)
    settings, directory = config(lr_scheduler_type="linear", learning_rate=0.01), tmp_path / "run"
    assert run(settings, directory) == 0
    finished = (directory / "adapter" / "adapter_model.safetensors").read_bytes()
    assert json.loads((directory / "run.json").read_text())["updates"] == STEPS

    capsys.readouterr()
    assert run(settings, directory, "max_steps=5") == 2
    assert (
        "8 updates are done there, and the run is to have 5 now; set max_steps to 8 or more" in capsys.readouterr().err
    )
    assert (directory / "adapter" / "adapter_model.safetensors").read_bytes() == finished

    assert run(settings, directory, "max_steps=null", "num_train_epochs=0.4", "load_best_model_at_end=false") == 0
    said = capsys.readouterr().out
    assert "resumed at step 8" in said
    # On a line to zero at step 16: half of the peak, where it would have been zero; a sixteenth at the last.
    line = (
        "16 updates instead of 8: the learning rate is 0.005 at step 9 (it would have been 0) and 0.000625 at the last"
    )
    assert line in said
    record = json.loads((directory / "run.json").read_text())
    assert (record["final"]["steps"], record["updates"]) == (16, 16)
    rates = {record["step"]: record["learning_rate"] for record in read_metrics(directory / "metrics.jsonl")}
    assert rates[9] == pytest.approx(0.005)
    assert list(rates) == list(range(1, 17))
    assert (directory / "adapter" / "adapter_model.safetensors").read_bytes() != finished
