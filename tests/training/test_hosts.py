"""Runs of several processes, for real: on one machine, with virtual devices, over the loopback interface."""

import json
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxft.config_file import load_config
from jaxft.training.logging import read_metrics

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
STEPS = 20
SETTINGS = {
    "dtype": "float32",
    "remat": "none",
    "lora_r": 4,
    "lora_target_modules": ["q_proj", "down_proj"],
    "lora_dropout": 0.1,
    "packing": True,
    "max_length": 40,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.03,
    "warmup_steps": 2,
    "max_steps": STEPS,
    "save_steps": 4,
    "logging_steps": 1,
    "resume_from_checkpoint": True,
    "mesh": {"data": 2, "fsdp": 2},
}


def logged(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return max((record["step"] for record in read_metrics(path)), default=0) if path.exists() else 0


def record_of(directory: Path) -> dict:
    return json.loads((directory / "run.json").read_text())


@pytest.fixture(scope="module")
def config(chat_model, write_chats, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("hosts")
    data = write_chats(directory / "chats.jsonl", 60)
    settings = {"model_name_or_path": str(chat_model()), "datasets": [str(data)], "output_dir": "replaced"}
    (directory / "config.yaml").write_text(load_config(settings | SETTINGS).to_yaml())
    return directory / "config.yaml"


@pytest.fixture(scope="module")
def train(config, start_job):
    """`train(directory, processes, devices, *overrides)`: a started job."""

    def start(directory: Path, processes: int, devices: int, *overrides: str, **options):
        words = (SCRIPTS / "train.py", "--config", config, f"output_dir={directory}", *overrides)
        return start_job(processes, devices, *words, **options)

    return start


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> Path:
    """A run of two processes with two devices each, which nobody disturbed."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    job = train(directory, 2, 2)
    assert job.end() == [0, 0], job.told()
    assert job.said(1) == "", "only the first process talks"
    return directory


@pytest.fixture(scope="module")
def preempted(train, tmp_path_factory) -> Path:
    """A run like `whole`, of which the second process was told to stop."""
    directory = tmp_path_factory.mktemp("preempted") / "run"
    job = train(directory, 2, 2)
    job.wait_for(lambda: logged(directory) >= 5)
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.end() == [75, 75], job.told()
    (step,) = (int(word) for word in job.said(0).splitlines()[-1].replace(";", "").split() if word.isdigit())
    assert 5 <= step < STEPS
    assert str(step) in os.listdir(directory / "checkpoints")
    assert job.said(1) == ""
    return directory


def curve(directory: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(directory / "metrics.jsonl") if "loss" in record]


@pytest.mark.slow
def test_two_processes_do_what_one_does(train, whole, tmp_path):
    directory = tmp_path / "alone"
    alone = train(directory, 1, 4)
    assert alone.end() == [0], alone.told()
    np.testing.assert_allclose(curve(whole), curve(directory), rtol=1e-4)
    assert len(curve(whole)) == STEPS
    adapters = [load_file(one / "adapter" / "adapter_model.safetensors") for one in (whole, directory)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, array in adapters[0].items():
        np.testing.assert_allclose(array, adapters[1][name], rtol=1e-3, atol=1e-5)
    assert record_of(whole)["fingerprints"] == record_of(directory)["fingerprints"]


@pytest.mark.slow
def test_a_run_of_which_one_process_was_killed_ends_and_resumes_to_the_same_bits(train, whole, preempted, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(preempted, directory)
    job = train(directory, 2, 2)
    job.wait_for(lambda: logged(directory) >= 14)
    job.processes[1].kill()
    killed = time.monotonic()
    codes = job.end()
    assert codes[0] not in (0, 75)
    assert codes[1] == -signal.SIGKILL
    assert time.monotonic() - killed < 30
    killed_one = f"process 1 of 2 ({socket.gethostname()})"
    ways = [f"{killed_one} is gone: it was killed", f"{killed_one} has not been heard of for "]
    assert any(way in job.said(0) for way in ways), job.said(0)
    assert "Traceback" not in job.said(0)

    job = train(directory, 2, 2)
    assert job.end() == [0, 0], job.told()
    assert re.search(r"^resumed at step (12|16)$", job.said(0), re.MULTILINE), job.told()
    records = [record_of(one) for one in (whole, directory)]
    for record in records:
        record["final"].pop("seconds")
    assert records[0]["final"] == records[1]["final"]
    assert records[0]["result_sha256"] == records[1]["result_sha256"]
    assert curve(directory) == curve(whole)


@pytest.mark.slow
def test_a_run_resumes_with_other_processes_on_another_mesh(train, whole, preempted, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(preempted, directory)
    job = train(directory, 4, 1, "mesh.data=4", "mesh.fsdp=1")
    assert job.end() == [0] * 4, job.told()
    assert "resumed with another mesh.fsdp (2 -> 1): equal up to rounding" in job.said(0)
    np.testing.assert_allclose(curve(whole), curve(directory), rtol=1e-4)


@pytest.mark.slow
def test_every_weight_is_trained_cut_over_processes_and_exported(train, tmp_path):
    words = ("adapter=none", "learning_rate=0.003", "mesh.data=1", "max_steps=3", "lora_dropout=0", "save_steps=2")
    words += ("val_set_size=6", "exact_match_samples=3", "max_new_tokens=4", "micro_batch_size=2", "warmup_steps=0")
    directories = [tmp_path / "together", tmp_path / "alone"]
    jobs = [train(directories[0], 2, 1, *words), train(directories[1], 1, 2, *words)]
    for job in jobs:
        assert set(job.end()) == {0}, job.told()
    models = [load_file(one / "model" / "model.safetensors") for one in directories]
    assert models[0].keys() == models[1].keys()
    for name, array in models[0].items():
        np.testing.assert_allclose(array, models[1][name], rtol=1e-3, atol=1e-5)
    finals = [record_of(one)["final"] for one in directories]
    assert finals[0]["eval_loss"] == pytest.approx(finals[1]["eval_loss"], rel=1e-4)
    exact = [final["exact_match"] for final in finals]
    assert exact[0] == exact[1]
    assert jobs[0].said(1) == ""
    state = directories[0] / "checkpoints" / "3" / "state"
    written = [sum(path.stat().st_size for path in state.glob(f"ocdbt.process_{index}/**/*")) for index in range(2)]
    assert 0.8 < written[0] / written[1] < 1.25, "each process writes its half"


# Hosts that are not of one mind


@pytest.mark.slow
def test_other_data_on_one_host_is_an_error_on_all(train, write_chats, tmp_path):
    for host in range(2):
        (tmp_path / str(host)).mkdir()
        write_chats(tmp_path / str(host) / "chats.jsonl", 20, seed=host)
    words = ('datasets=["chats.jsonl"]', "max_steps=1", "warmup_steps=0")
    job = train(tmp_path / "run", 2, 1, *words, "mesh.fsdp=1", cwd=lambda index: tmp_path / str(index))
    assert job.end() == [2, 2], job.told()
    for index in range(2):
        assert "the hosts of this run differ:\n  data: " in job.said(index)
        assert f" on process 1 of 2 ({socket.gethostname()}), " in job.said(index)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_file_that_one_host_lacks_ends_all(train, write_chats, tmp_path):
    for host in range(2):
        (tmp_path / str(host)).mkdir()
    write_chats(tmp_path / "0" / "chats.jsonl", 20)
    words = ('datasets=["chats.jsonl"]', "mesh.fsdp=1")
    job = train(tmp_path / "run", 2, 1, *words, cwd=lambda index: tmp_path / str(index))
    assert job.end() == [2, 2], job.told()
    assert job.said(1).startswith("process 1 of 2 (")
    assert "chats.jsonl" in job.said(1)
    assert "process 0 of 2 (" in job.said(0)
    assert ") failed: error: " in job.said(0)
    assert "chats.jsonl" in job.said(0)
