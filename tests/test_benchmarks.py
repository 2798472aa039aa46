"""The benchmark for GPUs, tried on this CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.models.hf_config import decoder_config
from jaxft.planning.abstract import AbstractStep
from jaxft.sharding.mesh import make_mesh

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    return gpu


def run(out: Path, *options: str) -> list[dict]:
    command = [sys.executable, BENCHMARKS / "gpu.py", "--small", "--steps", "1", "--out", out, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "results.json").read_text())


def test_rows_are_all_there_once_and_both_libraries_come_first(gpu):
    rows = gpu.rows()
    assert len(set(rows)) == len(rows) == 36 + 12 + 1
    assert {(row.library, row.quantization) for row in rows[:4]} == {
        ("jaxft", None),
        ("peft", None),
        ("jaxft", "nf4"),
        ("peft", "nf4"),
    }


def test_the_model_is_what_its_config_says(gpu, material):
    from gpu_step import decoder, hf_config

    for sizes in (gpu.SMALL, gpu.LLAMA_8B):
        assert decoder(sizes) == decoder_config(hf_config(sizes))
    raw = json.loads((material / "configs" / "meta-llama--Meta-Llama-3.1-8B_config.json").read_text())
    assert decoder(gpu.LLAMA_8B) == decoder_config(raw)


@pytest.mark.parametrize("packed", [False, True])
def test_flops_are_those_of_the_formula(gpu, packed):
    import gpu_step

    hidden, kv, inner, layers, vocabulary, rank = 4096, 1024, 14336, 32, 128256, 16
    shapes = [(hidden, hidden)] * 2 + [(hidden, kv)] * 2 + [(hidden, inner)] * 3
    weights, features = (layers * sum(each) for each in ([a * b for a, b in shapes], [a + b for a, b in shapes]))
    seen = layers * (4096 / (4 if packed else 1) + 1) / 2
    expected = 4 * weights + 6 * rank * features + 12 * hidden * seen + 4 * vocabulary * hidden
    assert gpu_step.flops_per_token(packed, gpu.LLAMA_8B) == pytest.approx(expected, rel=1e-12)


def test_arrays_are_those_of_the_step_and_random(gpu):
    import jax
    import numpy as np
    from gpu_step import config_of, decoder, drawn, on_device

    row = gpu.Row("jaxft", "nf4", 1, "full")
    step = AbstractStep(config_of(row, gpu.SMALL), decoder(gpu.SMALL), make_mesh({"data": 1}, jax.devices()[:1]))
    frozen = on_device(drawn, step.frozen)()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), frozen) == jax.tree.map(lambda x: (x.shape, x.dtype), step.frozen)
    layer = frozen["model"]["layers"][0][0]
    codes = np.asarray(layer["mlp"]["up_proj"]["weight"].get_value().codes).astype(int)
    assert set(codes.flat) == set(range(16))
    assert not np.array_equal(codes[0], codes[1])
    assert np.all(np.asarray(layer["input_layernorm"]["weight"].get_value()) == 1)
    assert np.std(np.asarray(frozen["lm_head"]["weight"].get_value(), float)) == pytest.approx(0.02, rel=0.02)


@pytest.mark.slow
@pytest.mark.parity
def test_a_small_model_gives_a_table(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torch's threads spin while they wait for one another
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    (one,) = run(tmp_path)
    assert len(one["rows"]) == 4
    for row in one["rows"]:
        assert "note" not in row, row
        assert row["losses"][0] == pytest.approx(7.62, abs=0.1)  # log 2048
        assert row["losses"][-1] < row["losses"][0]
        assert row["seconds"] == row["all_seconds"][-1]
        assert 0 < row["mfu"] < 1
    table = [line for line in (tmp_path / "results.md").read_text().splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in table[1:]] == [
        "| jaxft, bfloat16, 2 rows, remat attention+lora",
        "| peft, bfloat16, 2 rows, remat full",
        "| jaxft, nf4, 2 rows, remat attention+lora",
        "| peft, nf4, 2 rows, remat full",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "peft, note",
    [
        ("raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')", "out of memory"),
        ("raise ImportError('no such library')", "ImportError: no such library"),
        ("import time; time.sleep(100)", "no time left"),
    ],
)
def test_what_fails_is_a_row_and_runs_are_added(tmp_path, monkeypatch, peft, note):
    (tmp_path / "peft.py").write_text(peft)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    for runs in (1, 2):
        found = run(tmp_path, "--start", "1", "--count", "1", "--minutes", "0.1")
        assert [[row["note"] for row in each["rows"]] for each in found] == [[note]] * runs
    assert (tmp_path / "results.md").read_text().count(note) == 2
