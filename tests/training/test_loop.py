"""Whole runs on a tiny model: what is logged, evaluated, saved and exported, and when a run ends early."""

import io
import json
import math
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxft
from jaxft.cli.generate import main as generate_main
from jaxft.cli.train import main, train
from jaxft.config import Config
from jaxft.config_file import load_config
from jaxft.data.chat import load_tokenizer
from jaxft.data.loader import Schedule
from jaxft.data.tokenized import Tokenized, TokenizedSet
from jaxft.training import loop
from jaxft.training.account import Account, Bookkeeping, NonFiniteLossError
from jaxft.training.checkpoint import Checkpoints
from jaxft.training.held_out import is_evaluation, note_evaluation
from jaxft.training.inputs import gather
from jaxft.training.logging import MetricsLog, Progress, read_metrics
from jaxft.training.loop import is_overdue, is_save
from jaxft.training.optimizer import learning_rate_schedule
from jaxft.training.step import Metrics, make_train_step

CANARY = "hf_" + "canary" * 6

pytestmark = pytest.mark.usefixtures("quick_compiles", "one_device")


@pytest.fixture(scope="module")
def settings(chat_model, write_chats, tmp_path_factory):
    """`settings(**changes)`: a config with an output directory of its own; 48 examples, 8 of them held out."""
    model, directory = chat_model(), tmp_path_factory.mktemp("runs")
    data = write_chats(directory / "chats.jsonl", 56)

    def make(**changes) -> Config:
        number = sum(1 for _ in directory.iterdir())
        basics = {
            "model_name_or_path": str(model),
            "output_dir": str(directory / f"run{number}"),
            "datasets": [str(data)],
            "val_set_size": 8,
            "dtype": "float32",
            "remat": "none",
            "lora_r": 4,
            "lora_target_modules": ["q_proj", "down_proj"],
            "learning_rate": 0.01,
            "max_length": 48,
            "max_new_tokens": 4,
        }
        if changes.get("adapter") == "none":
            del basics["lora_r"], basics["lora_target_modules"]
        return load_config(basics | changes)

    return make


def losses(directory, kind: str) -> dict[int, float]:
    """Step -> value, for every record that has one."""
    found = [(r["step"], r[kind]) for r in read_metrics(directory / "metrics.jsonl") if kind in r]
    assert len({step for step, _ in found}) == len(found), "each step once"
    return dict(found)


def held_out_loss(model, config: Config) -> float:
    """Mean cross-entropy of the held-out examples, from the logits of right-padded rows."""
    examples = list(gather(config).data.eval)
    length = max(len(one.tokens) for one in examples)
    tokens, weights = np.zeros((len(examples), length), np.int32), np.zeros((len(examples), length))
    for row, one in enumerate(examples):
        tokens[row, : len(one.tokens)], weights[row, : len(one.tokens)] = one.tokens, one.loss_mask
    chances = np.asarray(jax.nn.log_softmax(jax.jit(lambda: model(tokens))()), np.float64)
    chosen = np.take_along_axis(chances[:, :-1], tokens[:, 1:, None], 2)[..., 0]
    return -(chosen * weights[:, 1:]).sum() / weights.sum()


# A run


@pytest.fixture(scope="module")
def whole(settings, quick_compiles, one_device):
    """Two epochs of 12 updates, and what was printed; there is a token in the environment."""
    config = settings(
        micro_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=2.0,
        logging_steps=5,
        save_steps=9,
        save_total_limit=1,
        exact_match_samples=3,
        warmup_steps=2,
        weight_decay=0.1,
    )
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setenv("HF_TOKEN", CANARY)
        result = train(config.model_dump())
    return SimpleNamespace(config=config, result=result, printed=printed.getvalue())


def test_metrics_have_the_promised_keys_at_the_promised_steps(whole):
    records = read_metrics(whole.result.output_dir / "metrics.jsonl")
    training = [record for record in records if "loss" in record]
    assert [list(record) for record in training] == [
        ["step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "skipped_updates"]
    ] * 5
    assert [record["step"] for record in training] == [5, 10, 15, 20, 24]
    evaluations = [record for record in records if record not in training]
    assert [list(record) for record in evaluations] == [["step", "eval_loss", "eval_perplexity"]] * 3
    assert [record["step"] for record in evaluations] == [0, 12, 24]
    assert [record["step"] for record in records] == sorted(record["step"] for record in records)
    for record in evaluations:
        assert record["eval_perplexity"] == pytest.approx(math.exp(record["eval_loss"]))

    inputs = gather(whole.config)
    assert inputs.total_steps == 24
    rate, tokens = learning_rate_schedule(whole.config, 24), 0
    for first, record in zip([0, 5, 10, 15, 20], training, strict=True):
        tokens += sum(int((inputs.schedule[step].segment_ids > 0).sum()) for step in range(first, record["step"]))
        assert record["tokens"] == tokens
        assert record["epoch"] == pytest.approx(record["step"] / 12, abs=1e-4)
        assert record["learning_rate"] == pytest.approx(float(rate(record["step"] - 1)))
        assert record["skipped_updates"] == 0
        assert record["grad_norm"] > 0
        assert record["tokens_per_second"] > 0


def test_losses_are_those_of_the_model(whole):
    """Before the first update, and of what was exported after the last."""
    found, base = losses(whole.result.output_dir, "eval_loss"), jaxft.load_model(whole.config.model_name_or_path)
    assert found[0] == pytest.approx(held_out_loss(base, whole.config), rel=1e-5)
    tuned = jaxft.load_adapter(base, whole.result.adapter_dir)
    assert found[24] == pytest.approx(held_out_loss(tuned, whole.config), rel=1e-5)
    assert found[24] < found[0] - 0.2
    trained = losses(whole.result.output_dir, "loss")
    assert trained[24] < trained[5]


def test_the_directory_of_a_run(whole):
    directory = whole.result.output_dir
    assert {path.name for path in directory.iterdir()} == {
        *("config.yaml", "run.json", "metrics.jsonl", "checkpoints", "adapter", "report.html", ".lock")
    }
    assert load_config(directory / "config.yaml") == whole.config
    assert {path.name for path in (directory / "adapter").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"),
        *("README.md", "jaxft_files.json"),
    }
    assert "<html" in (directory / "report.html").read_text()


def test_the_record_of_a_run(whole):
    directory, inputs = whole.result.output_dir, gather(whole.config)
    record, found = json.loads((directory / "run.json").read_text()), losses(directory, "eval_loss")
    assert record["fingerprints"] == inputs.fingerprints
    assert record["chat_template"] == inputs.renderer.tokenizer.chat_template
    files = {path.name for path in (whole.result.output_dir / "adapter").iterdir()}
    assert record["result_sha256"].keys() == files - {"README.md"}  # which is free to be edited
    assert record["data"]["train"] == 48
    assert record["data"]["held_out"] == 8
    assert [(part["format"], part["trained"]) for part in record["parameters"]] == [
        ("float32", False),
        ("float32", True),
    ]
    final = record["final"]
    assert final == whole.result.metrics
    assert final.keys() == {
        *("steps", "exported_step", "eval_loss", "best_eval_loss", "best_step", "stopped_early"),
        *("tokens", "skipped_updates", "seconds", "exact_match", "state_sha256"),
    }
    best = min((12, 24), key=found.get)
    assert (final["steps"], final["exported_step"], final["best_step"]) == (24, best, best)
    assert (final["eval_loss"], final["best_eval_loss"]) == (found[24], found[best])
    assert final["tokens"] == 2 * record["data"]["train_tokens"]
    assert final["exact_match"]["examples"] == 3
    assert final["skipped_updates"] == 0
    assert not final["stopped_early"]
    assert whole.result.steps == 24
    assert whole.result.adapter_dir == directory / "adapter"


def test_checkpoints_hold_the_adapter_and_nothing_of_the_base(whole):
    checkpoints = whole.result.output_dir / "checkpoints"
    assert {int(path.name) for path in checkpoints.iterdir()} == {24}
    (manifest,) = (checkpoints / "24" / "manifest").glob("metadata*")
    arrays = json.loads(manifest.read_text())["arrays"]
    of_model = {name for name in arrays if "model." in name}
    assert len(of_model) == 3 * 2 * 2, "values and two moments of A and B, in two linears"
    assert all(".adapter." in name for name in of_model)
    assert {name for name in arrays if name not in of_model} == {
        *("step", "skipped", "skipped_in_a_row", "optimizer.1.0.count", "optimizer.1.2.count")
    }
    factors = load_file(whole.result.adapter_dir / "adapter_model.safetensors")
    assert all("lora_" in name for name in factors)


def test_no_token_of_the_environment_is_printed_or_saved(whole):
    files = [path for path in whole.result.output_dir.rglob("*") if path.is_file()]
    assert {"config.yaml", "run.json", "metrics.jsonl", "report.html"} <= {path.name for path in files}
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    assert "held-out loss" in whole.printed
    assert CANARY not in whole.printed


# When to evaluate, what is best, when to stop


def stub(eval_steps=None, lengths=(4,) * 10, total_steps: int = 13, save_steps=None) -> SimpleNamespace:
    tokens = TokenizedSet.of([Tokenized(np.arange(n, dtype=np.int32), np.ones(n, bool)) for n in lengths])
    schedule = Schedule([tokens], micro_batch_size=2, max_length=8, packing=False, seed=0)
    config = SimpleNamespace(eval_steps=eval_steps, save_steps=save_steps)
    return SimpleNamespace(config=config, schedule=schedule, total_steps=total_steps)


@pytest.mark.core
@pytest.mark.parametrize(
    "eval_steps, total_steps, expected",
    [
        (4, 13, [4, 8, 12, 13]),
        (4, 12, [4, 8, 12]),
        (50, 13, [13]),
        (None, 13, [5, 10, 13]),  # epochs of five updates
        (None, 15, [5, 10, 15]),
        (None, 3, [3]),
    ],
)
def test_evaluation_comes_by_steps_or_epochs_and_at_the_end(eval_steps, total_steps, expected):
    inputs = stub(eval_steps, total_steps=total_steps)
    assert [step for step in range(1, total_steps + 1) if is_evaluation(inputs, step)] == expected


@pytest.mark.core
def test_checkpoints_come_by_steps_or_epochs_and_when_the_last_one_is_old():
    def saves(**settings) -> list[int]:
        return [step for step in range(1, 14) if is_save(stub(**settings), step)]

    assert saves() == [5, 10]  # epochs of five updates
    assert saves(save_steps=4) == [4, 8, 12]
    by_steps, by_epoch = stub(save_steps=4).config, stub().config
    assert [is_overdue(by_epoch, seconds) for seconds in (599, 600)] == [False, True]
    assert not is_overdue(by_steps, 1e6)


# What is read, and when


@pytest.mark.core
def test_an_update_is_read_when_the_next_one_was_started(tmp_path):
    """And not before: the devices go from one to the other without waiting for the host."""
    inputs = stub(total_steps=5)
    settings = {"logging_steps": 2, "max_nonfinite_steps": 3, "learning_rate": 1e-3, "warmup_ratio": 0.0}
    vars(inputs.config).update(settings, warmup_steps=0, lr_scheduler_type="linear")
    times = iter([0.0, 0.0, 2.0, 5.0, 9.0, 10.0])
    books = Bookkeeping()
    with MetricsLog(tmp_path / "metrics.jsonl") as log, Progress(5) as progress:
        account = Account(inputs, books, log, progress, times.__next__)
        for step in (1, 2, 3):
            account.enter(
                step, Metrics(float(step), step, 1.0, 10, skipped=0, skipped_in_a_row=0, measured={"odd": (step, 2.0)})
            )
            assert books.window.tokens + books.tokens == 10 * (step - 1)
        account.settle()
        account.settle()  # there is nothing more
        assert (books.tokens, books.window.tokens) == (20, 10)
        assert account.seconds == 4.0
        account.pause(1.0)
        account.enter(4, Metrics(1.0, 1, 1.0, 10, 3, 3, {"odd": (4, 0.0)}))
        with pytest.raises(NonFiniteLossError, match=r"step 4: loss 1\.0, gradient norm 1\.0; 3 updates in a row"):
            account.settle()
    two, four = read_metrics(tmp_path / "metrics.jsonl")
    assert (two["step"], two["loss"], two["tokens"], two["tokens_per_second"]) == (2, 5 / 3, 20, 20 / 5)
    assert (four["step"], four["loss"], four["tokens"], four["skipped_updates"]) == (4, 10 / 4, 40, 3)
    assert (two["odd"], four["odd"]) == (3 / 4, 7 / 2)
    assert four["tokens_per_second"] == 20 / (10 - 5 - 1)


@pytest.mark.parametrize("waited_for, ahead", [(math.inf, True), (0.0, False)])
def test_short_updates_are_started_ahead_of_what_is_read(settings, monkeypatch, waited_for, ahead):
    happened = []

    def make(*args):
        step = make_train_step(*args)

        def started(state, *rest):
            happened.append("started")
            return step(state, *rest)

        return started

    def settle(account, update, whole=Account._settle):
        happened.append(update.step)
        whole(account, update)

    monkeypatch.setattr(loop, "make_train_step", make)
    monkeypatch.setattr(loop, "WAITED_FOR", waited_for)
    monkeypatch.setattr(loop, "AHEAD", 4)
    monkeypatch.setattr(Account, "_settle", settle)
    train(settings(val_set_size=0, max_steps=6, micro_batch_size=4).model_dump())
    s = "started"
    if ahead:
        # The first is waited for, because of compiling; at 4 and at the end the run looks whether it is to stop.
        assert happened == [s, 1, s, s, 2, s, 3, 4, s, s, 5, 6]
    else:
        assert happened == [s, 1, s, 2, s, 3, s, 4, s, 5, s, 6]


def noted(scores: list[float], patience: int | None) -> tuple[list[bool], Bookkeeping]:
    books, config = Bookkeeping(), SimpleNamespace(early_stopping_patience=patience)
    improved = []
    for step, score_ in enumerate(scores, 1):
        improved.append(note_evaluation(books, config, step, score_))
        if books.stopped_early:
            break
    return improved, books


@pytest.mark.core
def test_the_best_is_the_lowest_and_the_earlier_of_equals():
    improved, books = noted([3.0, 2.0, 2.0, 2.5, 1.5, 1.6], None)
    assert improved == [True, True, False, False, True, False]
    assert (books.best_eval_loss, books.best_step, books.last_eval_loss) == (1.5, 5, 1.6)
    assert not books.stopped_early


@pytest.mark.core
@pytest.mark.parametrize(
    "scores, patience, stops_at",
    [
        ([3.0, 2.0, 2.5, 2.4, 1.0], 2, 4),
        ([3.0, 3.5, 2.9, 3.0, 2.8, 2.7], 2, None),  # never twice in a row
        ([3.0, 3.0], 1, 2),
        ([math.nan, math.nan, 2.0], 3, None),
        ([2.0, math.nan, math.nan, 1.0], 2, 3),
    ],
)
def test_patience_counts_evaluations_in_a_row_without_gain(scores, patience, stops_at):
    improved, books = noted(scores, patience)
    assert (len(improved) if books.stopped_early else None) == stops_at


@pytest.mark.core
def test_nan_is_never_the_best():
    improved, books = noted([math.nan, 2.0, math.nan, 1.0], None)
    assert improved == [False, True, False, True]
    assert (books.best_step, books.best_eval_loss) == (4, 1.0)


def test_a_run_stops_early_and_exports_its_best(settings):
    config = settings(
        learning_rate=1.0,
        warmup_steps=20,  # good at first, then too much
        micro_batch_size=8,
        max_steps=40,
        eval_steps=1,
        early_stopping_patience=3,
        logging_steps=4,
        save_total_limit=1,
    )
    result = train(config.model_dump())
    found = losses(result.output_dir, "eval_loss")
    del found[0]  # says what the base is worth and counts for nothing
    best = min(found, key=found.get)
    final = result.metrics
    assert final["stopped_early"]
    assert final["best_step"] == final["exported_step"] == best
    assert result.steps == final["steps"] == best + 3 < 40
    assert list(found) == list(range(1, best + 4))
    assert all(loss > found[best] for step, loss in found.items() if step > best)
    tuned = jaxft.load_adapter(jaxft.load_model(config.model_name_or_path), result.adapter_dir)
    assert held_out_loss(tuned, config) == pytest.approx(found[best], rel=1e-4)
    there = {int(path.name) for path in (result.output_dir / "checkpoints").iterdir()}
    assert there == {best, best + 3}
    inputs = gather(config)
    seen = sum(int((inputs.schedule[step].segment_ids > 0).sum()) for step in range(result.steps))
    assert final["tokens"] == seen, "of the updates since the last line of the log, too"


@pytest.mark.parametrize("fault", ["damaged", "gone"])
def test_a_lost_best_step_leaves_the_last_one_to_export(settings, monkeypatch, caplog, fault):
    """The work of the run is not lost with it, and nobody takes the one for the other."""
    whole = Checkpoints.restore_trained

    def restore(self, like, step):
        if fault == "damaged":
            next((self.directory / str(step) / "manifest").iterdir()).write_text("")
        else:
            shutil.rmtree(self.directory / str(step))
        return whole(self, like, step)

    monkeypatch.setattr(Checkpoints, "restore_trained", restore)
    config = settings(learning_rate=100.0, warmup_steps=3, max_steps=4, eval_steps=1, micro_batch_size=4)
    result = train(config.model_dump())
    assert result.metrics["best_step"] < result.metrics["exported_step"] == 4
    assert "the best step is lost, so the last one, 4, is exported" in caplog.text


def test_what_an_objective_measures_stands_in_the_log_and_the_report(settings):
    """The plain loss beside that of dynamic fine-tuning; held-out examples are judged by the plain one."""
    by_type = {
        name: train(settings(loss_type=name, max_steps=2, logging_steps=1, micro_batch_size=4).model_dump())
        for name in ("nll", "dft")
    }
    plain, weighted = (by_type[name].output_dir for name in ("nll", "dft"))
    assert losses(weighted, "nll")[1] == pytest.approx(losses(plain, "loss")[1], rel=1e-6)
    assert losses(weighted, "loss")[1] < losses(weighted, "nll")[1]
    assert losses(weighted, "eval_loss")[0] == losses(plain, "eval_loss")[0]
    assert losses(plain, "nll") == {}
    titles = ["<h3>nll</h3>" in (directory / "report.html").read_text() for directory in (plain, weighted)]
    assert titles == [False, True]


def test_max_steps_win_over_epochs_and_the_last_weights_may_be_exported(settings):
    config = settings(
        max_steps=5,
        num_train_epochs=7.0,
        micro_batch_size=4,
        learning_rate=100.0,
        warmup_steps=5,  # the first update changes nothing, the others destroy
        eval_steps=1,
        logging_steps=1,
        load_best_model_at_end=False,
    )
    result = train(config.model_dump())
    found = losses(result.output_dir, "eval_loss")
    assert list(losses(result.output_dir, "loss")) == [1, 2, 3, 4, 5]
    assert result.steps == result.metrics["exported_step"] == 5
    assert result.metrics["best_step"] == 1
    assert found[1] == found[0] < found[5]
    tuned = jaxft.load_adapter(jaxft.load_model(config.model_name_or_path), result.adapter_dir)
    assert held_out_loss(tuned, config) == pytest.approx(found[5], rel=1e-4)


# Losses that are not finite


def test_a_run_whose_loss_stays_nan_is_given_up(settings, tmp_path, capsys):
    """The first update throws the weights so far away that every loss after it is NaN."""
    config = settings(
        learning_rate=1e38,
        lr_scheduler_type="constant",
        val_set_size=0,
        max_steps=30,
        micro_batch_size=4,
        max_nonfinite_steps=3,
        logging_steps=7,
        save_steps=1,
        save_total_limit=9,
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert main(["--config", str(tmp_path / "config.yaml")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: step 4: loss nan, gradient norm nan; 3 updates in a row were not finite")
    assert "Lower learning_rate" in error
    directory = tmp_path / config.output_dir
    (record,) = read_metrics(directory / "metrics.jsonl")
    assert (record["step"], record["skipped_updates"]) == (4, 3)
    assert math.isnan(record["loss"])
    assert math.isnan(record["grad_norm"])
    assert json.loads((directory / "run.json").read_text())["finished"] is None
    assert {path.name for path in directory.iterdir()} == {
        *("config.yaml", "run.json", "metrics.jsonl", "checkpoints", ".lock")
    }
    # What was saved are the weights after the first update, each time.
    digests = set()
    for step in (1, 2, 3):
        (manifest,) = (directory / "checkpoints" / str(step) / "manifest").glob("metadata*")
        arrays = json.loads(manifest.read_text())["arrays"]
        digests.add(tuple(sorted((name, a["digest"]) for name, a in arrays.items() if "adapter" in name)))
    assert len(digests) == 1
    assert {path.name for path in (directory / "checkpoints").iterdir()} == {"1", "2", "3"}


# Every weight


def test_full_training_writes_a_model(settings):
    config = settings(adapter="none", max_steps=4, micro_batch_size=8, learning_rate=3e-3, logging_steps=1)
    result = train(config.model_dump())
    assert result.adapter_dir == result.output_dir / "model"
    assert not (result.output_dir / "adapter").exists()
    model, found = jaxft.load_model(result.adapter_dir), losses(result.output_dir, "eval_loss")
    assert held_out_loss(model, config) == pytest.approx(found[4], rel=1e-5)
    assert found[4] < found[0]
    before, after = (load_file(f"{d}/model.safetensors") for d in (config.model_name_or_path, result.adapter_dir))
    assert before.keys() == after.keys()
    assert all(np.abs(before[name] - after[name]).max() > 1e-4 for name in before)
    assert (result.adapter_dir / "tokenizer.json").exists()
    stops = json.loads((result.adapter_dir / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [0, 2], "the end of a turn, too"

    # Killed between the export and the end, the run is ended by its resumption.
    run = json.loads((result.output_dir / "run.json").read_text())
    (result.output_dir / "run.json").write_text(json.dumps({**run, "finished": None}))
    (result.adapter_dir / "model.safetensors").write_bytes(b"half")
    again = train(config.model_dump(), resume_from_checkpoint=True)
    assert again.metrics["state_sha256"] == run["final"]["state_sha256"]
    assert json.loads((result.output_dir / "run.json").read_text())["result_sha256"] == run["result_sha256"]
    np.testing.assert_equal(load_file(again.adapter_dir / "model.safetensors"), after)


def test_full_training_in_bfloat16_keeps_what_float32_learned(settings):
    result = train(settings(adapter="none", dtype="bfloat16", max_steps=1, micro_batch_size=8).model_dump())
    weights = load_file(result.adapter_dir / "model.safetensors")
    rounded = {name: np.asarray(jnp.asarray(w, jnp.bfloat16), np.float32) for name, w in weights.items()}
    assert all(w.dtype == np.float32 and (w != rounded[name]).any() for name, w in weights.items())


# What the result is asked with


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_the_result_is_asked_with_the_template_it_was_trained_with(settings, adapter, tmp_path, capsys):
    """The base has none."""
    base = Path(shutil.copytree(settings().model_name_or_path, tmp_path / "base"))
    (base / "chat_template.jinja").unlink()
    template = "{% for m in messages %}{{ m.role }} <|sep|> {{ m.content }} <|im_end|> {% endfor %}" + (
        "{% if add_generation_prompt %}assistant <|sep|> {% endif %}"
    )
    (tmp_path / "own.jinja").write_text(template)
    config = settings(
        model_name_or_path=str(base), chat_template=str(tmp_path / "own.jinja"), adapter=adapter, max_steps=1
    )
    result = train(config.model_dump())
    where = ["--model", base, "--adapter", result.adapter_dir] if adapter == "lora" else ["--model", result.adapter_dir]
    assert generate_main([*map(str, where), "--chat", "--prompt", "the old dog", "--max-new-tokens", "2"]) == 0
    assert load_tokenizer(result.adapter_dir).chat_template == template


def test_a_question_that_fills_the_model_is_not_asked(settings, tmp_path):
    """The example is too long to be learned, and is counted; the run goes on without its answer."""
    config = settings()
    turns = [{"role": "user", "content": "dog " * 200}, {"role": "assistant", "content": "a cat"}]
    short = [{"role": "user", "content": "a dog"}, {"role": "assistant", "content": "a cat"}]
    rows = tmp_path / "held_out.jsonl"
    rows.write_text("".join(json.dumps({"messages": one}) + "\n" for one in (turns, short)))
    changes = {"eval_datasets": [str(rows)], "val_set_size": 0, "max_steps": 1, "exact_match_samples": 2}
    result = train(config.model_dump() | changes)
    assert result.metrics["exact_match"]["examples"] == 1
