"""The command as a user meets it: what it prints, what it refuses, and that a refusal leaves nothing behind."""

import json
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from orbax.checkpoint import CheckpointManager
from safetensors.numpy import load_file, save_file

from jaxft.cli import train as command
from jaxft.cli.train import main, train
from jaxft.config import ConfigError
from jaxft.config_file import load_config
from jaxft.hub.checkpoint import Checkpoint
from jaxft.training.begun import nothing_to_lose
from jaxft.training.logging import read_metrics
from jaxft.training.run_directory import open_run

pytestmark = pytest.mark.usefixtures("quick_compiles", "one_device")


@pytest.fixture(scope="module")
def model(chat_model) -> Path:
    return chat_model()


@pytest.fixture
def place(model, write_chats, tmp_path, monkeypatch) -> Path:
    """The current directory, with a config.yaml that names a model and data there, and trains three updates."""
    shutil.copytree(model, tmp_path / "model")
    write_chats(tmp_path / "chats.jsonl", 30)
    settings = {
        "model_name_or_path": "./model",
        "output_dir": "run",
        "datasets": ["chats.jsonl"],
        "dtype": "float32",
        "lora_r": 2,
        "lora_alpha": 32,
        "lora_target_modules": ["v_proj"],
        "remat": "none",
        "max_steps": 3,
        "max_length": 48,
        "micro_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
    }
    (tmp_path / "config.yaml").write_text(load_config(settings).to_yaml())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(directory: Path) -> dict[str, bytes]:
    found = (path for path in directory.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def final(place: Path, run: str = "run") -> dict:
    return json.loads((place / run / "run.json").read_text())["final"]


def refused(capsys, *arguments: str) -> str:
    """The one line on stderr of a command that ends with 2."""
    capsys.readouterr()
    assert main(["--config", "config.yaml", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert "Traceback" not in printed.err
    return printed.err


# --dry-run


@pytest.fixture
def no_weights(monkeypatch):
    def refuse(checkpoint, name, *_):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Checkpoint, "read", refuse)


def test_a_dry_run_prints_the_plan_reads_no_weights_and_writes_nothing(place, no_weights, capsys):
    turns = [
        {"role": "user", "content": "the old dog sees a bird ?"},
        {"role": "assistant", "content": "a new bird"},
    ]
    (place / "one.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    before = files(place)
    changes = ["datasets=[one.jsonl]", "micro_batch_size=2", "gradient_accumulation_steps=3", "max_steps=7"]
    assert main(["--config", "config.yaml", "--dry-run", *changes, "quant_type=nf4"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert files(place) == before
    assert not (place / "run").exists()

    config, rest = printed.out.split("\n\n", 1)
    (place / "printed.yaml").write_text(config)
    assert load_config("printed.yaml") == load_config("config.yaml", [*changes, "quant_type=nf4"])
    # 2 layers with q, o 32x32, k, v 16x32, gate, up, down 48x32; embedding, head, five norms; v adapters of rank 2
    codes, dense, trained = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32), 2 * 32 * 32 + 5 * 32, 2 * 2 * (32 + 16)
    assert f"{codes + dense + trained:,} parameters, {trained:,} trained" in rest
    assert f"  nf4: {codes:,} parameters" in rest
    assert f"  float32: {dense:,} parameters, {dense * 4 / 1e6:,.1f} MB\n" in rest
    assert f"  float32: {trained:,} parameters, 0.0 MB, trained\n" in rest
    tokens, learned = 11 + 7, 4
    assert "one.jsonl: messages (detected by messages)" in rest
    assert f"training on 1 examples, {tokens} tokens, {learned} learned\nheld out 0 examples" in rest
    asked = "<|im_start|> user <|sep|> the old dog sees a bird ? <|im_end|> <|im_start|> assistant <|sep|>"
    assert f"\n{asked}⟦ a new bird <|im_end|>⟧\n" in rest
    assert (
        "effective batch: 6 rows of 48 tokens = 2 (micro_batch_size) x 3 (accumulation) x 1 (data x fsdp x expert); "
        "mesh: data 1 x fsdp 1 x expert 1 x context 1 x tensor 1\n"
        "attention: blockwise, as there is no kernel for a cpu\n7 updates, 7.00 epochs\n"
    ) in rest


@pytest.mark.core
def test_what_a_dry_run_prints_is_printed_as_it_is(place, no_weights, capsys, write_chats):
    """Names that a terminal library takes for markup, and lines longer than a terminal."""
    name = "[bold]" + "long" * 40 + ":smile:.jsonl"
    write_chats(place / name, 4)
    assert main(["--config", "config.yaml", "--dry-run", f"datasets=['{name}']"]) == 0
    out = capsys.readouterr().out
    assert f"- path: '{name}'\n" in out
    assert f"\n{name}: messages" in out


# What is refused, before anything is written


@pytest.mark.core
@pytest.mark.parametrize("dry", [True, False], ids=["dry-run", "run"])
@pytest.mark.parametrize(
    "overrides, message",
    [
        (["learning_rte=1e-4"], "command line: learning_rte: unknown key; did you mean `learning_rate`?"),
        (["lora_target_modules=[c_attn]"], "target_modules ['c_attn'] matches no linear layer; there are: "),
        (["rank_pattern={q_proj: 4}"], "rank_pattern: 'q_proj' matches none of the targets: model.layers.*"),
        (["datasets=[gone.jsonl]"], "gone.jsonl"),
        (["model_name_or_path=./gone"], "no such directory: './gone'"),
        (
            ["adapter_name_or_path=./gone", "lora_r=16", "lora_alpha=32", "lora_target_modules=all-linear"],
            "gone/adapter_config.json: no such file",
        ),
        (["mesh.data=2"], "mesh: data=2 x fsdp=1 x expert=1 x context=1 x tensor=1 is 2 devices, but there are 1"),
    ],
)
def test_bad_input_ends_with_2_and_leaves_nothing_behind(place, capsys, overrides, message, dry):
    before = files(place)
    assert message in refused(capsys, *overrides, *["--dry-run"] * dry)
    assert files(place) == before
    assert not (place / "run").exists()


def test_a_bad_line_is_named_by_file_and_line(place, capsys):
    with open(place / "chats.jsonl", "a") as file:
        file.write('{"messages": [{"role": "user", "content": "a"}\n')
    assert "chats.jsonl:31: " in refused(capsys)
    assert not (place / "run").exists()


def test_a_vocabulary_larger_than_the_embedding_is_refused(place, chat_model, capsys):
    small = chat_model(vocab_size=20)
    assert "20" in refused(capsys, f"model_name_or_path={small}")
    assert not (place / "run").exists()


def test_a_directory_of_something_else_is_left_alone(place, capsys):
    """And refused before the data is read, which may take long."""
    (place / "chats.jsonl").write_text("not read")
    (place / "run").mkdir()
    (place / "run/thesis.tex").write_text("x")
    for resume in ("true", "false"):
        error = refused(capsys, f"resume_from_checkpoint={resume}")
        assert "output_dir run is not empty (it holds thesis.tex)" in error
    assert [path.name for path in (place / "run").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("dry", [True, False], ids=["dry-run", "run"])
def test_what_can_be_known_early_is_said_before_the_data_is_read(place, capsys, monkeypatch, dry):
    arguments = ["--dry-run"] if dry else []
    (place / "chats.jsonl").write_text("not read")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "report_to: wandb needs the package wandb" in refused(capsys, "report_to=wandb", *arguments)
    (place / "file").write_text("x")
    assert "output_dir file is a file" in refused(capsys, "output_dir=file", *arguments)
    (place / "link").symlink_to("nowhere")
    assert "link is a link to nowhere, which does not exist" in refused(capsys, "output_dir=link", *arguments)
    (place / "run").mkdir()
    (place / "run/thesis.tex").write_text("x")
    assert "output_dir run is not empty" in refused(capsys, *arguments)


def test_a_dry_run_of_a_resume_says_what_the_resume_would(done, capsys):
    before = files(done / "run")
    resume = ["--dry-run", "resume_from_checkpoint=true", "save_steps=2"]
    assert "set resume_from_checkpoint: true" in refused(capsys, "--dry-run")
    assert "learning_rate: 0.01 -> 0.02" in refused(capsys, *resume, "learning_rate=0.02")
    assert "rows of an update changed: 4 -> 8" in refused(capsys, *resume, "micro_batch_size=8")
    assert "3 updates are done there, and the run is to have 2" in refused(capsys, *resume, "max_steps=2")
    assert main(["--config", "config.yaml", *resume, "micro_batch_size=2", "gradient_accumulation_steps=2"]) == 0
    assert "resumed with another micro_batch_size (4 -> 2)" in capsys.readouterr().err
    assert files(done / "run") == before


def test_two_runs_do_not_share_a_directory(place, capsys):
    config = load_config("config.yaml")
    with open_run("run", False, config.to_yaml(), {}) as first:
        before = files(place)
        assert "output_dir run is in use by process" in refused(capsys)
        assert "output_dir run is in use by process" in refused(capsys, "resume_from_checkpoint=true")
        assert files(place) == before
        assert first.record["finished"] is None


# A run, and whether it may go on


@pytest.fixture
def done(place, capsys) -> Path:
    """The place after a run of three updates."""
    assert main(["max_steps=3", "--config", "config.yaml", "save_steps=2"]) == 0
    return place


def test_a_finished_run_is_neither_overwritten_nor_resumed_with_changes(done, write_chats, capsys):
    """Everything is told at once, by name; what is put back resumes."""
    before = files(done / "run")
    assert "resume_from_checkpoint: true" in refused(capsys, "save_steps=2")
    resume = ["resume_from_checkpoint=true", "save_steps=2"]
    assert "learning_rate: 0.01 -> 0.02" in refused(capsys, *resume, "learning_rate=0.02")
    assert "seed: 42 -> 43" in refused(capsys, *resume, "seed=43")

    original, other = done / "chats.jsonl", done / "other.jsonl"
    shutil.copyfile(original, other)
    with open(original, "a") as file:
        file.write(original.read_text().splitlines()[0] + "\n")
    error = refused(capsys, *resume, "learning_rate=0.02")
    assert "the data changed: " in error
    assert "learning_rate: 0.01 -> 0.02" in error
    shutil.copyfile(other, original)

    path = done / "model/tokenizer.json"
    content = path.read_text()
    words = json.loads(content)
    words["model"]["vocab"]["extra"] = 31
    path.write_text(json.dumps(words))
    error = refused(capsys, *resume)
    assert "the tokenizer changed: " in error
    assert "data" not in error
    path.write_text(content)

    path = done / "model/model.safetensors"
    weights, saved = load_file(path), path.read_bytes()
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, path)
    assert "the base changed: " in refused(capsys, *resume)
    path.write_bytes(saved)

    assert files(done / "run") == before
    digest = final(done)["state_sha256"]
    (done / "run/adapter/.adapter_model.safetensors.tmp").write_text("left by a kill")
    assert main(["--config", "config.yaml", *resume, "logging_steps=2"]) == 0
    assert "resumed at step 3" in capsys.readouterr().out
    assert final(done)["state_sha256"] == digest
    after = files(done / "run")
    assert after.keys() == before.keys()
    assert {name for name in before if after[name] != before[name]} == {*("run.json", "config.yaml", "report.html")}


def test_a_wrong_target_put_right_needs_no_other_directory(place, capsys):
    refused(capsys, "lora_target_modules=[c_attn]")
    assert main(["--config", "config.yaml"]) == 0
    assert final(place)["steps"] == 3


def test_a_run_that_failed_before_its_first_update_may_be_started_over(place, capsys, monkeypatch):
    """As when the memory was too small: with other settings, in the same directory."""

    def fail(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(command, "fit", fail)
        assert main(["--config", "config.yaml"]) == 1
    assert "no memory left on a device: out of memory" in capsys.readouterr().err
    assert json.loads((place / "run/run.json").read_text())["finished"] is None
    assert main(["--config", "config.yaml", "micro_batch_size=2"]) == 0
    assert final(place)["steps"] == 3
    assert load_config(place / "run/config.yaml").micro_batch_size == 2
    assert [record["step"] for record in read_metrics(place / "run/metrics.jsonl")] == [1, 2, 3]


@pytest.mark.core
@pytest.mark.parametrize(
    "there, expected",
    [
        ([], False),
        (["thesis.tex"], False),
        (["run.json"], True),
        (["run.json", "metrics.jsonl"], True),
        (["run.json", "metrics of step 1"], False),
        (["run.json", "metrics of no step"], True),
        (["run.json", "checkpoints/"], True),
        (["run.json", "checkpoints/3/"], False),
        (["run.json", "adapter/"], False),
        (["run.json", "model/"], False),
        (["run.json", "metrics.jsonl", "checkpoints/12/"], False),
    ],
)
def test_what_may_be_started_over(tmp_path, there, expected):
    for name in there:
        if name.endswith("/"):
            (tmp_path / name).mkdir(parents=True)
        elif name.startswith("metrics"):
            last = {"1": '{"step": 1, "loss": 2.0}\n', "p": '{"loss": 2.0}\n'}.get(name[-1], "")
            (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 3.0}\n' + last)
        else:
            (tmp_path / name).write_text("{}")
    assert nothing_to_lose(tmp_path) is expected
    assert not nothing_to_lose(tmp_path / "absent")


# A signal


def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(place, capsys, monkeypatch):
    settings = ["max_steps=6", "packing=true", "save_steps=100", "val_set_size=6", "eval_steps=2"]
    settings += ["max_new_tokens=4", "logging_steps=2"]
    assert main(["--config", "config.yaml", *settings, "output_dir=whole"]) == 0

    class Interrupting(command.Progress):
        def update(self, step, record=None):
            super().update(step, record)
            if step in (3, 6):
                signal.raise_signal(signal.SIGTERM)

    settings.append("resume_from_checkpoint=true")
    for step, kept in {3: {"2", "3"}, 6: {"6", "4"}}.items():  # after the last, too, before the export
        with monkeypatch.context() as patch:
            patch.setattr(command, "Progress", Interrupting)
            patch.setattr("jaxft.training.loop.WAITED_FOR", 0.0)  # it looks after every update
            capsys.readouterr()
            assert main(["--config", "config.yaml", *settings]) == 75
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"stopped by a signal after step {step}; resume with resume_from_checkpoint=true"
        )
        assert kept == {path.name for path in (place / "run/checkpoints").iterdir()}
        assert not (place / "run/adapter").exists()
    assert main(["--config", "config.yaml", *settings]) == 0
    assert "resumed at step 6" in capsys.readouterr().out
    assert {**final(place), "seconds": 0} == {**final(place, "whole"), "seconds": 0}
    adapter = "adapter/adapter_model.safetensors"
    assert (place / "run" / adapter).read_bytes() == (place / "whole" / adapter).read_bytes()
    logged = [
        [{**record, "tokens_per_second": 0} for record in read_metrics(place / run / "metrics.jsonl")]
        for run in ("run", "whole")
    ]
    assert logged[0] == logged[1]


def test_a_signal_whose_checkpoint_cannot_be_written_is_an_error(place, capsys, monkeypatch):
    """Not the exit code that promises a checkpoint; the failure shows only after the save has begun."""
    failures = []
    begin, finish = CheckpointManager.save, CheckpointManager.wait_until_finished

    def save(manager, *arguments, **options):
        begin(manager, *arguments, **options)
        failures.append(OSError(28, "No space left on device"))

    def wait(manager):
        finish(manager)
        if failures:
            raise failures.pop()

    class Interrupting(command.Progress):
        def update(self, step, record=None):
            super().update(step, record)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(CheckpointManager, "save", save)
    monkeypatch.setattr(CheckpointManager, "wait_until_finished", wait)
    monkeypatch.setattr(command, "Progress", Interrupting)
    assert "run/checkpoints/1 could not be written: No space left on device; make room there; " in refused(capsys)
    assert json.loads((place / "run/run.json").read_text())["finished"] is None
    assert not (place / "run/adapter").exists()


@pytest.mark.parametrize("lost", ["model", "model/tokenizer.json"])
def test_a_model_moved_away_while_it_trains_is_named_and_nothing_is_lost(place, capsys, monkeypatch, lost):
    """Not the directory that was being written; and the next attempt removes what a kill left there."""

    class Moving(command.Progress):
        def update(self, step, record=None):
            super().update(step, record)
            if (place / lost).exists():
                (place / lost).rename(place / "away")

    with monkeypatch.context() as patch:
        patch.setattr(command, "Progress", Moving)
        error = refused(capsys, "max_steps=1")
    reason = "no such directory" if lost == "model" else "holds no tokenizer any more"
    assert re.match(f"error: (.*/)?model:? {reason}; the model was moved or changed while it was in use", error)
    assert ".tmp" not in error
    stale = place / "run/.adapter.0a1b2c3d.tmp"
    stale.mkdir()
    (place / "away").rename(place / lost)
    assert main(["--config", "config.yaml", "max_steps=1", "resume_from_checkpoint=true"]) == 0
    assert "resumed at step 1" in capsys.readouterr().out
    assert (place / "run/adapter/adapter_model.safetensors").exists()
    assert not stale.exists()


# The Python interface


def test_train_takes_a_mapping_or_a_file_and_overrides(place):
    mapping = {
        "model_name_or_path": "./model",
        "output_dir": "ignored",
        "datasets": [{"path": "chats.jsonl"}],
        "dtype": "float32",
        "lora_target_modules": ["v_proj"],
    }
    target = place / "Größe [1] 🐦"
    result = train(mapping, output_dir=target, max_steps=1, learning_rate=1e-5, **{"mesh.fsdp": 1})
    assert result.output_dir == target
    assert result.adapter_dir == target / "adapter"
    assert (result.steps, result.metrics) == (1, final(place, target.name))
    config = load_config(target / "config.yaml")
    assert (config.learning_rate, config.max_steps, config.mesh.fsdp) == (1e-5, 1, 1)
    assert not (place / "ignored").exists()
    again = train("config.yaml", output_dir="from a file", lora_target_modules=["q_proj"], max_steps=2)
    assert again.steps == 2
    assert load_config("from a file/config.yaml").lora_target_modules == ["q_proj"]


def test_train_raises_what_the_command_prints(place):
    with pytest.raises(ConfigError, match="did you mean `lora_r`"):
        train("config.yaml", lora_rr=3)
    with pytest.raises(ValueError, match="matches no linear layer"):
        train("config.yaml", lora_target_modules=["c_attn"])
    assert not (place / "run").exists()


# Answers


def test_answers_end_where_the_template_ends_a_turn(place, monkeypatch):
    """The model's own settings say 0, <eos>; the template ends turns with 2, <|im_end|>."""
    asked = []

    def answers(model, renderer, questions, eos_ids, max_new_tokens):
        asked.append((list(eos_ids), max_new_tokens, model.model.layers[0][0].self_attn.v_proj.adapter is None))
        return [question.reference if len(asked) == 2 else "wrong" for question in questions]

    monkeypatch.setattr(command, "answers", answers)
    result = train("config.yaml", val_set_size=8, exact_match_samples=6, max_new_tokens=9)
    assert asked == [([0, 2], 9, True), ([0, 2], 9, False)]
    assert result.metrics["exact_match"] == {"base": 0, "tuned": 6, "examples": 6}
