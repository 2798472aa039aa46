"""The promise: killed at any moment and resumed, a run ends in the bits of the run that was never killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxft.config_file import load_config
from jaxft.training.logging import read_metrics

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train.py"
STEPS, KILLS, PATIENCE = 60, 5, 180.0
SETTINGS = {
    "dtype": "float32",
    "remat": "none",
    "lora_r": 4,
    "lora_target_modules": ["q_proj", "down_proj"],
    "lora_dropout": 0.1,
    "packing": True,
    "max_length": 40,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.03,
    "weight_decay": 0.1,
    "warmup_steps": 5,
    "max_steps": STEPS,
    "val_set_size": 8,
    "eval_steps": 4,
    "exact_match_samples": 4,
    "max_new_tokens": 4,
    "save_steps": 3,
    "logging_steps": 2,  # so that there are checkpoints between two lines
    "resume_from_checkpoint": True,
}


class Run:
    """A process that trains in a directory."""

    def __init__(self, config: Path, directory: Path):
        self.directory = directory
        self.log = directory.with_suffix(".log")
        environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, SCRIPT, "--config", config, f"output_dir={directory}"],
                env=environment,
                stdout=log,
                stderr=log,
            )

    def wait_for(self, event: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not event():
            assert self._process.poll() is None, f"the run ended by itself:\n{self.told()}"
            assert time.monotonic() < end, f"nothing happened:\n{self.told()}"
            time.sleep(0.002)

    def end(self, number: signal.Signals | None = None) -> int:
        """Send a signal, if one is given; the exit code."""
        if number is not None:
            self._process.send_signal(number)
        return self._process.wait(PATIENCE)

    def told(self) -> str:
        return self.log.read_text()

    def logged(self) -> int:
        """The last step in metrics.jsonl."""
        path = self.directory / "metrics.jsonl"
        return max((record["step"] for record in read_metrics(path)), default=0) if path.exists() else 0

    def saving(self) -> int:
        """The last step for which there is a checkpoint, or a part of one."""
        path = self.directory / "checkpoints"
        names = os.listdir(path) if path.exists() else []
        return max((int(name.split(".")[0]) for name in names if name[0].isdigit()), default=0)


@pytest.fixture(scope="module")
def config(chat_model, write_chats, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("resume")
    data = write_chats(directory / "chats.jsonl", 60)
    settings = {"model_name_or_path": str(chat_model()), "datasets": [str(data)], "output_dir": "replaced"}
    (directory / "config.yaml").write_text(load_config(settings | SETTINGS).to_yaml())
    return directory / "config.yaml"


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_in_the_same_bits(config, tmp_path):
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # shown when the test fails
    chance = random.Random(seed)
    whole = Run(config, tmp_path / "whole")
    directory = tmp_path / "killed"

    steps = sorted(chance.sample(range(2, STEPS - 20), KILLS))
    for step, at_save in zip(steps, chance.sample([True, True, True, False, False], KILLS), strict=True):
        run = Run(config, directory)
        reached = run.saving if at_save else run.logged
        run.wait_for(lambda reached=reached, step=step: reached() >= step)
        delay = chance.uniform(0, 0.02 if at_save else 0.05)
        time.sleep(delay)
        assert run.end(signal.SIGKILL) == -signal.SIGKILL, run.told()
        print(f"killed {delay:.3f} s after {'saving' if at_save else 'logging'} step {step}; logged {run.logged()}")

    run = Run(config, directory)
    before = run.logged()
    run.wait_for(lambda: run.logged() > before)
    assert run.end(signal.SIGTERM) == 75, run.told()
    stopped = run.told().splitlines()[-1]
    assert stopped.endswith("; resume with resume_from_checkpoint=true")
    last = int(stopped.removeprefix("stopped by a signal after step ").split(";")[0])
    assert last == max(int(name) for name in os.listdir(directory / "checkpoints"))

    run = Run(config, directory)
    run.wait_for((directory / "adapter").exists)
    run.end(signal.SIGKILL)
    assert f"resumed at step {last}\n" in run.told()

    run = Run(config, directory)
    assert run.end() == 0, run.told()
    assert run.told().count(f"resumed at step {STEPS}\n") == 1
    assert whole.end() == 0, whole.told()

    records = {name: json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "killed")}
    assert len(records["killed"]["resumed"]) >= KILLS
    for record in records.values():
        record["final"].pop("seconds")
    assert records["killed"]["final"] == records["whole"]["final"]
    assert records["killed"]["result_sha256"] == records["whole"]["result_sha256"]
    adapters = [{path.name: path.read_bytes() for path in (tmp_path / name / "adapter").iterdir()} for name in records]
    for name, files in zip(records, adapters, strict=True):
        files["README.md"] = files["README.md"].replace(name.encode(), b"run")  # which is named after its directory
    assert adapters[0] == adapters[1]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= adapters[0].keys()
    metrics = [
        [{**record, "tokens_per_second": 0} for record in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in records
    ]
    assert metrics[0] == metrics[1]
    assert [record["step"] for record in metrics[0] if "loss" in record] == list(range(2, STEPS + 1, 2))
    kept = [sorted(os.listdir(tmp_path / name / "checkpoints")) for name in records]
    assert kept[0] == kept[1]
