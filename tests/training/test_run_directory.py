"""Who may write to an output directory, and when a run may go on."""

import errno
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import optax
import pytest

from jaxft.config import Config
from jaxft.hub.stage import staged
from jaxft.training import run_directory
from jaxft.training.begun import RunDirectoryError
from jaxft.training.manifest import is_sealed
from jaxft.training.run_directory import check_same, check_vacant, open_run
from jaxft.training.same_run import FREE_KEYS, LENGTH_KEYS, ROUNDING_KEYS

FINGERPRINTS = {"data": "d" * 64, "tokenizer": "t" * 64, "base": "b" * 64, "template": "c" * 64}


def config(**changes) -> str:
    settings = {
        "model_name_or_path": "m",
        "output_dir": "o",
        "datasets": ["a.jsonl"],
        "eval_datasets": ["e.jsonl"],
    }
    return Config(**{**settings, **changes}).to_yaml()


def start(path: Path, *, resume: bool = False, fingerprints=FINGERPRINTS, **changes):
    return open_run(path, resume, config(**changes), fingerprints)


def started(path: Path, checkpoint: int | None = 5) -> dict:
    """What run.json holds after a run that was killed, after a checkpoint if one is given."""
    with start(path) as run:
        if checkpoint is not None:
            (run.checkpoints / str(checkpoint)).mkdir(parents=True)
        return json.loads(run.run_file.read_text())


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


# A new run


def test_a_new_run_records_what_it_is(tmp_path):
    path = tmp_path / "deep" / "run"
    with start(path, learning_rate=1e-3) as run:
        assert not run.resumed
        record = json.loads((path / "run.json").read_text())
        assert record["fingerprints"] == FINGERPRINTS
        assert record["run_id"] == run.record["run_id"]
        assert record["versions"]["jax"] == jax.__version__
        assert record["versions"]["optax"] == optax.__version__
        assert record["versions"]["python"] == sys.version.split()[0]
        assert {"jaxft", "flax", "orbax-checkpoint"} <= record["versions"].keys()
        assert record["devices"] == {"kind": "cpu", "count": jax.device_count()}
        assert record["started"].endswith("+00:00")
        assert record["finished"] is None
        assert (path / "config.yaml").read_text() == config(learning_rate=1e-3)
        names = ("config_file", "run_file", "metrics_file", "checkpoints", "adapter", "report_file")
        assert [getattr(run, name) for name in names] == [
            path / name
            for name in ("config.yaml", "run.json", "metrics.jsonl", "checkpoints", "adapter", "report.html")
        ]
        run.finish({"adapter_sha256": "ab"})
        after = json.loads((path / "run.json").read_text())
        assert is_sealed(after)
        assert after.pop("config_sha256") == hashlib.sha256((path / "config.yaml").read_bytes()).hexdigest()
        assert after == {**record, "adapter_sha256": "ab", "finished": after["finished"], "sha256": after["sha256"]}
        run.finish({"loss": float("nan")})
        assert is_sealed(json.loads((path / "run.json").read_text()))
        run.write_run({"finished": None})
        assert "sha256" not in json.loads((path / "run.json").read_text()), "it goes on"
        assert after["finished"] >= record["started"]
    with start(tmp_path / "other") as other:
        assert other.record["run_id"] != record["run_id"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_directory_of_something_else_is_left_alone(tmp_path, resume):
    for name in ("thesis.tex", "a", "b", "c", "d", "e", "f"):
        (tmp_path / name).write_text("x")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RunDirectoryError, match=r"is not empty \(it holds a, b, c, d, e and 2 more\).*no run\.json"):
        start(tmp_path, resume=resume)
    assert sorted(tmp_path.iterdir()) == before


def test_without_resume_an_earlier_run_is_left_alone(tmp_path):
    started(tmp_path)
    before = files(tmp_path)
    advice = "checkpoints, config.yaml, run.json.*: choose another output_dir, or set resume_from_checkpoint: true"
    with pytest.raises(RunDirectoryError, match=advice):
        start(tmp_path)
    assert files(tmp_path) == before


def test_checkpoints_without_a_record_are_not_ours(tmp_path):
    started(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(RunDirectoryError, match=r"no run\.json"):
        start(tmp_path, resume=True)


def test_the_output_directory_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirectoryError, match="file is a file, not a directory"):
        start(tmp_path / "file")
    with pytest.raises(RunDirectoryError, match=r"file/run cannot be written: .*/file is a file; choose another"):
        start(tmp_path / "file" / "run")


@pytest.mark.parametrize("below", ["", "deeper/run"])
def test_a_link_to_nowhere_is_named(tmp_path, below):
    (tmp_path / "scratch").symlink_to("/not/mounted")
    for refused in (start, lambda path: check_vacant(path, False)):
        with pytest.raises(RunDirectoryError, match="scratch is a link to /not/mounted, which does not exist; make"):
            refused(tmp_path / "scratch" / below)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    with start(tmp_path / "link" / below):
        pass


def test_the_output_directory_cannot_be_written(tmp_path, monkeypatch):
    def refuse(path, flags, *mode):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RunDirectoryError, match="run cannot be written: Permission denied; choose another"):
        start(tmp_path / "run")


# Resume


def test_an_unchanged_run_resumes(tmp_path):
    before = started(tmp_path)
    with start(tmp_path, resume=True, resume_from_checkpoint=True) as run:
        assert run.resumed
        assert run.record["run_id"] == before["run_id"]
        assert run.record["started"] == before["started"]
        assert len(run.record["resumed"]) == 1
    with start(tmp_path, resume=True) as run:
        assert len(json.loads(run.run_file.read_text())["resumed"]) == 2


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_a_changed_fingerprint_is_named(tmp_path, name):
    started(tmp_path)
    before = files(tmp_path)
    with pytest.raises(RunDirectoryError, match=f"the {name} changed: {FINGERPRINTS[name]} -> other\n") as raised:
        start(tmp_path, resume=True, fingerprints={**FINGERPRINTS, name: "other"})
    assert str(raised.value).count("changed:") == 1
    assert files(tmp_path) == before


def test_a_fingerprint_more_or_less_is_a_change(tmp_path):
    started(tmp_path)
    with pytest.raises(RunDirectoryError, match="the eval data changed: nothing -> e"):
        start(tmp_path, resume=True, fingerprints={**FINGERPRINTS, "eval data": "e"})
    with pytest.raises(RunDirectoryError, match=f"the data changed: {'d' * 64} -> nothing"):
        start(tmp_path, resume=True, fingerprints={k: v for k, v in FINGERPRINTS.items() if k != "data"})


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"learning_rate": 1e-3}, "learning_rate: 0.0002 -> 0.001"),
        ({"seed": 7}, "seed: 42 -> 7"),
        ({"warmup_steps": 10}, "warmup_steps: 0 -> 10"),
        ({"early_stopping_patience": 2}, "early_stopping_patience: null -> 2"),
        ({"datasets": [{"path": "a.jsonl", "type": "text"}]}, "datasets.0.type: null -> text"),
        ({"datasets": ["a.jsonl", "b.jsonl"]}, "datasets.1.path: nothing -> b.jsonl"),
        ({"lora_target_modules": ["q_proj"]}, "lora_target_modules: all-linear -> nothing"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern.q_proj: nothing -> 4"),
    ],
)
def test_a_changed_config_is_refused_key_by_key(tmp_path, changes, line):
    started(tmp_path)
    with pytest.raises(RunDirectoryError, match="not the run that was started there") as raised:
        start(tmp_path, resume=True, **changes)
    assert f"\n  {line}\n" in str(raised.value)


PLACES = {
    "model_name_or_path": "/elsewhere/m",
    "model_revision": "v1",
    "adapter_name_or_path": "/elsewhere/a",
    "chat_template": "/elsewhere/c.jinja",
    "datasets": ["/elsewhere/a.jsonl"],
    "eval_datasets": ["/elsewhere/e.jsonl"],
}


@pytest.mark.parametrize("key", PLACES)
def test_what_is_the_same_may_lie_elsewhere(tmp_path, caplog, key):
    """On another machine, whose paths are others. The fingerprints say what lies there."""
    before = {"adapter_name_or_path": "a"} if key == "adapter_name_or_path" else {}
    with start(tmp_path, **before) as run:
        (run.checkpoints / "5").mkdir(parents=True)
    name = f"{key}.0.path" if key.endswith("datasets") else key
    with pytest.raises(RunDirectoryError, match=rf"the data changed: (.|\n)*  {name}: .* -> "):
        start(tmp_path, resume=True, fingerprints={**FINGERPRINTS, "data": "x"}, **{key: PLACES[key]})
    assert not caplog.records
    with start(tmp_path, resume=True, **{key: PLACES[key]}) as run:
        assert run.resumed
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"resumed with another {name} (")
    assert warning.endswith("): what lies there is the same")


def test_all_changes_are_told_at_once(tmp_path):
    started(tmp_path)
    with pytest.raises(RunDirectoryError) as raised:
        start(tmp_path, resume=True, fingerprints={**FINGERPRINTS, "base": "x"}, learning_rate=1.0, seed=1)
    assert [line.split(":")[0] for line in str(raised.value).splitlines()[1:-1]] == [
        "  the base changed",
        "  learning_rate",
        "  seed",
    ]


def test_what_does_not_decide_the_result_may_change(tmp_path, caplog):
    assert set(Config.model_fields) >= FREE_KEYS | ROUNDING_KEYS | LENGTH_KEYS
    started(tmp_path)
    changes = {
        "output_dir": "./o",
        "resume_from_checkpoint": True,
        "logging_steps": 1,
        "report_to": ["wandb"],
        "save_steps": 10,
        "save_total_limit": 9,
        "max_nonfinite_steps": 50,
        "load_best_model_at_end": False,
        "exact_match_samples": 3,
        "sample_prompts": 2,
        "max_new_tokens": 5,
    }
    assert set(changes) == FREE_KEYS
    with start(tmp_path, resume=True, **changes) as run:
        assert run.resumed
        assert run.config_file.read_text() == config(**changes)
    assert not caplog.records
    other = {"mesh": {"fsdp": 8}, "remat": "none", "micro_batch_size": 2, "gradient_accumulation_steps": 8}
    with start(tmp_path, resume=True, **changes, **other, max_steps=10, num_train_epochs=3.0) as run:
        assert run.resumed
    warned = [record.getMessage() for record in caplog.records]
    assert "resumed with another mesh.fsdp (1 -> 8): equal up to rounding" in warned
    assert "resumed with another remat (full -> none): equal up to rounding" in warned
    assert "resumed with another micro_batch_size (1 -> 2): equal up to rounding" in warned


@pytest.mark.parametrize(
    "old, new, changes, advice",
    [
        (
            "8",
            "4",
            {"micro_batch_size": 4},
            "8 rows on 1 groups (data x fsdp x expert) are micro_batch_size: 4 with "
            "gradient_accumulation_steps: 2, or another pair whose product is 8",
        ),
        (
            "8",
            "24",
            {"micro_batch_size": 3, "gradient_accumulation_steps": 2},
            "8 rows on 4 groups (data x fsdp x "
            "expert) are micro_batch_size: 1 with gradient_accumulation_steps: 2, or another pair whose product is 2",
        ),
        ("8", "3", {}, "8 rows cannot be shared out among 3 groups (data x fsdp x expert): take another mesh"),
    ],
)
def test_other_rows_of_an_update_are_refused_with_what_would_fit(tmp_path, caplog, old, new, changes, advice):
    with start(tmp_path, fingerprints={"rows of an update": old}) as run:
        (run.checkpoints / "5").mkdir(parents=True)
    with pytest.raises(RunDirectoryError) as raised:
        start(tmp_path, resume=True, fingerprints={"rows of an update": new}, **changes)
    assert f"\n  the rows of an update changed: {old} -> {new}; {advice}\n" in str(raised.value)
    assert not caplog.records, "nothing is said of a run that does not go on"


@pytest.mark.parametrize("recorded", ["x", None, 8, {"a": 1}])
def test_rows_that_were_not_recorded_as_a_number_are_a_change_like_any_other(tmp_path, recorded):
    with start(tmp_path, fingerprints={"rows of an update": recorded}) as run:
        (run.checkpoints / "5").mkdir(parents=True)
    with pytest.raises(RunDirectoryError, match=r"the rows of an update.* changed: "):
        start(tmp_path, resume=True, fingerprints={"rows of an update": "4"})


def test_keys_that_lost_or_never_had_an_effect_are_no_changes(tmp_path):
    """They are not in the written config, or are, where an earlier version wrote all keys."""
    started(tmp_path)
    written = (tmp_path / "config.yaml").read_text()
    assert "\nquant_group_size" not in written
    (tmp_path / "config.yaml").write_text(written + "quant_group_size: 64\n")
    with start(tmp_path, resume=True, sample_prompts=0) as run:
        assert "\nmax_new_tokens" not in run.config_file.read_text()
    with start(tmp_path, resume=True) as run:
        assert "\nmax_new_tokens: 128\n" in run.config_file.read_text()


def test_other_versions_and_devices_are_said(tmp_path, caplog):
    record = started(tmp_path)
    record["versions"]["jax"], record["devices"]["count"] = "0.1.2", 4096
    (tmp_path / "run.json").write_text(json.dumps(record))
    with start(tmp_path, resume=True) as run:
        assert run.record["versions"]["jax"] == jax.__version__
    assert f"another versions.jax (0.1.2 -> {jax.__version__}): the last bits may differ" in caplog.text
    assert "another devices.count (4096 -> 8)" in caplog.text


@pytest.mark.parametrize("key", ["resumed", "fingerprints", "versions", "devices"])
def test_a_record_with_something_else_in_it_is_damaged(tmp_path, key):
    record = started(tmp_path)
    for value in (None, 3, "x"):
        (tmp_path / "run.json").write_text(json.dumps(record | {key: value}))
        with pytest.raises(RunDirectoryError, match=rf"run\.json is damaged \({key} is {json.dumps(value)}\)"):
            start(tmp_path, resume=True)


def test_a_number_of_updates_that_is_none_is_damage(tmp_path):
    """It is written after the others, so it may be missing."""
    record = started(tmp_path)
    for value in (None, "8", 8.5, [8]):
        (tmp_path / "run.json").write_text(json.dumps(record | {"updates": value}))
        with pytest.raises(RunDirectoryError, match=r"run\.json is damaged \(updates is "):
            start(tmp_path, resume=True)
    (tmp_path / "run.json").write_text(json.dumps(record | {"updates": 8}))
    with start(tmp_path, resume=True) as run:
        assert run.record["updates"] == 8


@pytest.mark.parametrize("text", ['{"run_id": "x', "[]", '{"run_id": "x"}', "\0" * 50])
def test_a_damaged_record_is_an_error(tmp_path, text):
    started(tmp_path)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunDirectoryError, match=r"run\.json is damaged"):
        start(tmp_path, resume=True)
    assert (tmp_path / "run.json").read_text() == text


def test_a_lost_or_damaged_config_is_an_error(tmp_path):
    started(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(RunDirectoryError, match=r"config\.yaml is damaged"):
        start(tmp_path, resume=True)
    for text, reason in {"": "it is empty", "- a": "it is not a mapping", "\n# x\n": "it is empty"}.items():
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(RunDirectoryError, match=rf"config\.yaml is damaged \({reason}\): .* unknown; put it back"):
            start(tmp_path, resume=True)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(RunDirectoryError, match=r"config\.yaml is missing"):
        start(tmp_path, resume=True)


# Resume where there is nothing yet


@pytest.mark.parametrize("state", ["missing", "empty", "only a lock"])
def test_resume_of_nothing_starts_a_run(tmp_path, caplog, state):
    path = tmp_path / "run"
    if state != "missing":
        path.mkdir()
    if state == "only a lock":
        (path / ".lock").write_text("process 1 on gone")
        (path / ".run.json.tmp").write_text('{"half')
    with start(path, resume=True) as run:
        assert not run.resumed
    assert "holds no checkpoint yet: starting from the beginning" in caplog.text


def test_resume_before_the_first_checkpoint_starts_again(tmp_path, caplog):
    before = started(tmp_path, checkpoint=None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    with start(tmp_path, resume=True, learning_rate=1e-5) as run:
        assert not run.resumed
        assert run.record["run_id"] != before["run_id"]
        assert not run.metrics_file.exists()
        assert run.config_file.read_text() == config(learning_rate=1e-5)
    assert "starting from the beginning" in caplog.text


def test_a_finished_run_is_not_started_again(tmp_path):
    with start(tmp_path) as run:
        run.finish({})
    with pytest.raises(RunDirectoryError, match="has finished, and there is no checkpoint"):
        start(tmp_path, resume=True)
    for result in ("adapter", "model"):
        other = tmp_path / f"other {result}"
        with start(other) as run:
            getattr(run, result).mkdir()
        with pytest.raises(RunDirectoryError, match="has finished, and there is no checkpoint"):
            start(other, resume=True)
        with pytest.raises(RunDirectoryError, match="has finished, and there is no checkpoint"):
            check_same(other, True, config(), FINGERPRINTS)


def test_what_a_kill_in_an_export_left_is_removed_but_not_what_is_being_exported(tmp_path):
    started(tmp_path)
    for name in (".adapter.5d2f0a1b.tmp", ".model.0123abcd.tmp", "adapter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("x")
    with staged(tmp_path / "merged") as live, start(tmp_path, resume=True):
        there = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
        assert there == [live.name, "adapter", "checkpoints"]


# A look ahead


def test_what_would_be_refused_is_seen_without_touching_anything(tmp_path):
    check_vacant(tmp_path / "new" / "run", False)
    check_same(tmp_path / "new" / "run", True, config(), FINGERPRINTS)
    assert not (tmp_path / "new").exists()
    started(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    check_vacant(tmp_path, True)
    check_same(tmp_path, True, config(), FINGERPRINTS)
    with pytest.raises(RunDirectoryError, match="set resume_from_checkpoint: true"):
        check_vacant(tmp_path, False)
    with pytest.raises(RunDirectoryError, match="seed: 42 -> 1"):
        check_same(tmp_path, True, config(seed=1), FINGERPRINTS)
    with pytest.raises(RunDirectoryError, match="the base changed"):
        check_same(tmp_path, True, config(), {**FINGERPRINTS, "base": "x"})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with start(tmp_path, resume=True), pytest.raises(RunDirectoryError, match="in use by process"):
        check_vacant(tmp_path, True)


# One owner


def test_a_second_run_is_refused_while_the_first_lives(tmp_path):
    with start(tmp_path) as run:
        before = files(tmp_path)
        for resume in (False, True):
            with pytest.raises(RunDirectoryError, match=rf"in use by process {os.getpid()} on "):
                start(tmp_path, resume=resume)
        assert files(tmp_path) == before
        (run.checkpoints / "1").mkdir(parents=True)
    with start(tmp_path, resume=True) as run:
        assert run.resumed


def test_a_refused_run_leaves_no_lock_behind(tmp_path):
    started(tmp_path)
    for _ in range(2):
        with pytest.raises(RunDirectoryError, match="seed: 42 -> 1"):
            start(tmp_path, resume=True, seed=1)


def test_the_lock_of_a_killed_process_vanishes(tmp_path):
    script = """
import sys, time
from jaxft.training.run_directory import open_run
run = open_run(sys.argv[1], False, sys.argv[2], {"data": "x"})
(run.checkpoints / "3").mkdir(parents=True)
print("open", flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", script, str(tmp_path), config()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(RunDirectoryError, match=rf"in use by process {process.pid} on "):
            start(tmp_path, resume=True, fingerprints={"data": "x"})
        process.send_signal(signal.SIGKILL)
    with start(tmp_path, resume=True, fingerprints={"data": "x"}) as run:
        assert run.resumed


# Files


def test_run_json_is_never_half_written(tmp_path, monkeypatch):
    with start(tmp_path) as run:
        before = run.run_file.read_text()

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(RunDirectoryError, match=r"run\.json cannot be written: No space left on device"):
            run.write_run({"loss": 1.0})
        assert run.run_file.read_text() == before
        assert "loss" not in run.record
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "config.yaml", "run.json"]
        monkeypatch.undo()
        with pytest.raises(TypeError, match="object is not JSON serializable"):
            run.write_run({"loss": object()})
        run.write_run({"loss": 0.5})
        assert json.loads(run.run_file.read_text()) == {**json.loads(before), "loss": 0.5}


LINES = [
    '{"step": 1, "loss": 2.5}',
    '{"step": 2, "loss": 2.25}',
    '{"step": 2, "eval_loss": 3}',
    '{"step": 3}',
]


@pytest.mark.parametrize("tail", ["", '{"step": 4}', '{"step": 4, "lo', "\0\0\0", '{"step'])
@pytest.mark.parametrize("step, left", [(0, 0), (1, 1), (2, 3), (3, 4)])
def test_metrics_after_the_restored_step_are_dropped(tmp_path, tail, step, left):
    with start(tmp_path) as run:
        run.metrics_file.write_text("".join(line + "\n" for line in LINES) + tail)
        run.truncate_metrics(step)
        assert run.metrics_file.read_text() == "".join(line + "\n" for line in LINES[:left])


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path):
    with start(tmp_path) as run:
        run.metrics_file.write_text("\n".join(LINES))
        run.truncate_metrics(3)
        assert run.metrics_file.read_text() == "".join(line + "\n" for line in LINES)


@pytest.mark.parametrize("bad", ['{"step": 2, "lo', "3", '{"loss": 1}', '{"step": "2"}', ""])
def test_a_bad_line_in_the_middle_is_an_error(tmp_path, bad):
    text = f"{LINES[0]}\n{bad}\n{LINES[3]}\n"
    with start(tmp_path) as run:
        run.metrics_file.write_text(text)
        with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl:2: not a JSON object with a step"):
            run.truncate_metrics(3)
        assert run.metrics_file.read_text() == text


def test_no_metrics_yet(tmp_path):
    with start(tmp_path) as run:
        run.truncate_metrics(3)
        assert not run.metrics_file.exists()


def test_messages_are_warnings_of_this_module(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), start(tmp_path, resume=True):
        pass
    assert {record.name for record in caplog.records} == {run_directory.__name__}
