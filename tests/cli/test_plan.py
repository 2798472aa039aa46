"""`scripts/plan.py` as people run it."""

import json

import pytest

from jaxft.cli.plan import main

RAW = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture
def config(tmp_path):
    """A model of which there is nothing but config.json, and data that is not there."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(RAW))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model_name_or_path: {tmp_path}/model\noutput_dir: {tmp_path}/out\ndatasets: [none.jsonl]\n"
        "max_length: 64\npacking: true\n"
    )
    return path


def plan(config, *words, topology="cpu:2"):
    return main(["--config", str(config), "--topology", topology, *words])


def test_a_run_that_fits(config, capsys):
    assert plan(config, "mesh.fsdp=2") == 0
    out = capsys.readouterr().out
    assert "2 x cpu, mesh fsdp 2" in out
    assert out.splitlines()[-1].startswith("fits: 0.00 of")
    assert not (config.parent / "out").exists()


def test_a_run_that_does_not_fit(config, capsys, monkeypatch):
    monkeypatch.setattr("jaxft.planning.plan.Plan.fits", False)
    assert plan(config) == 1


def test_json_is_one_object_and_nothing_else(config, capsys):
    assert plan(config, "--json", "micro_batch_size=3") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["micro_batch_size"] == 3
    assert told["fits"] is True
    assert set(told["per_device_bytes"]) == {
        "base", "adapters", "optimizer", "gradients", "temporaries", "total",
    }  # fmt: skip


def test_a_search_prints_what_it_tried_and_the_lines_of_the_best(config, capsys):
    assert plan(config, "--search", "gradient_accumulation_steps=2", topology="cpu:1") == 0
    out = capsys.readouterr().out
    assert out.startswith("an update keeps its rows: 2 of 64 tokens\n\nmesh ")
    assert "\nmicro_batch_size: 2\ngradient_accumulation_steps: 1\nremat: " in out
    assert "\nmesh: {data: 1}\n" in out


def test_a_search_that_finds_nothing_says_by_how_much(config, capsys, monkeypatch):
    monkeypatch.setattr("jaxft.planning.plan.Plan.fits", False)
    assert plan(config, "--search", topology="cpu:1") == 1
    out = capsys.readouterr().out
    assert "does not fit, short by" in out
    assert out.endswith("\nnothing fits\n")
    assert plan(config, "--search", "--json", topology="cpu:1") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is False
    assert told["per_device_bytes"]["total"] > 0


@pytest.mark.parametrize(
    "words, topology, message",
    [
        ([], "h1:1", "'h1:1' is no machine; write v5e:4x4"),
        (["mesh.fsdp=3"], "cpu:2", "fsdp=3"),
        (["max_lenght=3"], "cpu:1", "max_lenght"),
        (["mesh.expert=2"], "cpu:2", "this model has none"),
    ],
)
def test_what_cannot_be_planned(config, capsys, words, topology, message):
    assert plan(config, *words, topology=topology) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
