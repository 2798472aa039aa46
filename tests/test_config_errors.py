"""What a person reads when a config is wrong: where, which key, what, and nothing secret."""

from pathlib import Path

import pytest

from jaxft.config import ConfigError
from jaxft.config_file import load_config

BASE = {"model_name_or_path": "org/model", "datasets": ["train.jsonl"], "output_dir": "runs/a"}
BASE_YAML = "model_name_or_path: org/model\ndatasets: [train.jsonl]\noutput_dir: runs/a\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes run.yaml, BASE_YAML and then the text, into an empty current directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        Path("run.yaml").write_text(BASE_YAML + text)
        return "run.yaml"

    return write


def complaint(source, overrides=()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return str(caught.value)


def test_required_keys_are_reported_together():
    assert complaint({}).splitlines() == [
        "config: model_name_or_path: is required",
        "config: datasets: is required",
        "config: output_dir: is required",
    ]


def test_unknown_keys_are_reported_together_with_suggestions(write):
    path = write(
        "learning_rat: 1\nlora_rnk: 8\nzzz: 1\nmesh: {fdsp: 2}\nval_size: [x]\n3: x\n"
        "eval_datasets: [{path: a, wieght: 3, split: b}, {path: b, colums: {}}]\n"
    )
    assert sorted(complaint(path).splitlines()) == [
        "run.yaml: 3: must be a string, as all keys (got 3)",
        "run.yaml: eval_datasets.0.wieght: unknown key; did you mean `weight`?",
        "run.yaml: eval_datasets.1.colums: unknown key; did you mean `columns`?",
        "run.yaml: learning_rat: unknown key; did you mean `learning_rate`?",
        "run.yaml: lora_rnk: unknown key; did you mean `lora_rank`?",
        "run.yaml: mesh.fdsp: unknown key; did you mean `fsdp`?",
        "run.yaml: val_size (val_set_size): must be a valid integer or a valid number (got a list)",
        "run.yaml: zzz: unknown key",
    ]


def test_a_dotted_key_belongs_on_the_command_line(write):
    assert complaint(write("mesh.fsdp: 8\n")) == "run.yaml: mesh.fsdp: unknown key; did you mean `mesh`?"


def test_complaints_tell_the_file_from_the_command_line(write):
    path = write("lora_r: 0\nmesh: {fsdp: -1}\n")
    assert sorted(complaint(path, ["seed=-1", "mesh.tensor=-1"]).splitlines()) == [
        "command line: seed: must be greater than or equal to 0 (got -1)",
        "run.yaml with the command line: mesh: only one axis can be -1, not fsdp and tensor",
        "run.yaml: lora_r: must be greater than 0 (got 0)",
    ]
    assert complaint(write("warmup_ratio: 0.1\n"), ["early_stopping_patience=2"]).startswith(
        "run.yaml with the command line: early_stopping_patience needs held-out examples"
    )
    assert complaint(write("mesh: 3\n"), ["mesh.fsdp=2"]) == (
        "command line: mesh.fsdp: the config has no mesh.fsdp to change"
    )


@pytest.mark.parametrize("text", [
    "token: hf_CaNaRy", "hub: {token: CaNaRy, password: CaNaRy}", "eval_datasets: [{path: a, token: CaNaRy}]",
    "mesh: {token: CaNaRy}", "lora_r: hf_CaNaRy", "report_to: hf_CaNaRy", "mesh: hf_CaNaRy",
    "quantization_bit: hf_CaNaRy", "lora_rank: hf_CaNaRy\nr: 8", "rank_pattern: {q: hf_CaNaRy}",
    f"hf_{'CaNaRy' * 5}: 3", "token: *hf_CaNaRy", "token: hf_CaNaRy: 3", "token: [hf_CaNaRy",
])  # fmt: skip
def test_no_complaint_shows_what_may_be_a_secret(write, text):
    with pytest.raises(ConfigError) as caught:
        load_config(write(text))
    assert "CaNaRy" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("override", ["token=hf_CaNaRy", "hf_CaNaRy", "lora_r=hf_CaNaRy", "token=[hf_CaNaRy"])
def test_no_complaint_shows_a_secret_of_the_command_line(override):
    assert "CaNaRy" not in complaint(BASE, [override])
