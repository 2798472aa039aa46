import io
import json
import math
import struct
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxft.training import logging
from jaxft.training.logging import MetricsLog, Progress, Sink, open_sinks, read_metrics

TRAIN = {"step": 10, "loss": 1.2341, "grad_norm": 0.561, "learning_rate": 1e-4, "tokens_per_second": 1234.4}
EVALUATION = {"step": 20, "eval_loss": 1.5}


def strict(line: str):
    """As a reader that knows the JSON of RFC 8259 and no more."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_numbers_of_any_library_become_plain_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    record = {
        "step": np.int32(3),
        "loss": jnp.float32(0.1),
        "half": jnp.bfloat16(1.5),
        "tokens": np.int64(2**40),
        "array": np.array(2.5),
        "finite": jnp.array(True),
        "note": "é\n",
    }
    with MetricsLog(path) as log:
        log.log(record)
    expected = {"step": 3, "loss": float(np.float32(0.1)), "half": 1.5, "tokens": 2**40, "array": 2.5}
    assert strict(path.read_text()) == {**expected, "finite": True, "note": "é\n"}


def test_not_finite_values_are_logged_so_that_every_reader_accepts_them(tmp_path):
    path = tmp_path / "metrics.jsonl"
    seen = []
    with MetricsLog(path, [Sink(seen.append, lambda: None)]) as log:
        log.log({"step": 1, "loss": jnp.float32("nan"), "grad_norm": math.inf, "floor": np.float32("-inf")})
        log.log({"step": 2, "loss": 1.5})
    written = [strict(line) for line in path.read_text().splitlines()]
    assert written[0] == {"step": 1, "loss": "NaN", "grad_norm": "Infinity", "floor": "-Infinity"}
    for record in (seen[0], read_metrics(path)[0], {key: float(v) for key, v in written[0].items()}):
        assert math.isnan(record["loss"])
        assert (record["grad_norm"], record["floor"]) == (math.inf, -math.inf)
    assert read_metrics(path)[1] == seen[1] == {"step": 2, "loss": 1.5}


def test_every_record_is_on_disk_at_once_and_lines_are_added(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for start in (1, 3):
        with MetricsLog(path) as log:
            for step in (start, start + 1):
                log.log({"step": step, "loss": 1.0 / step})
                assert [record["step"] for record in read_metrics(path)] == list(range(1, step + 1))


def test_a_line_cut_by_a_kill_is_removed_when_the_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}]
    with MetricsLog(path) as log:
        log.log({"step": 2, "loss": 2.25})
    assert path.read_text() == '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n'


@pytest.mark.parametrize(
    "record, message",
    [
        ({"step": 1, "loss": np.ones(2)}, "`loss` is ndarray"),
        ({"step": 1, "loss": None}, "`loss` is NoneType"),
        ({"loss": 1.0}, "`step` must be an integer, got None"),
        ({"step": 1.0}, "`step` must be an integer, got 1.0"),
        ({"step": True}, "`step` must be an integer, got True"),
    ],
)
def test_a_record_that_cannot_be_logged_names_the_key_and_writes_nothing(tmp_path, record, message):
    path = tmp_path / "metrics.jsonl"
    seen = []
    with MetricsLog(path, [Sink(seen.append, lambda: None)]) as log, pytest.raises(ValueError, match=message):
        log.log(record)
    assert path.read_text() == ""
    assert seen == []


@pytest.mark.parametrize("line, reason", [("{oops}", "not JSON"), ("[1]", "not a JSON object")])
def test_a_damaged_metrics_file_is_named_with_its_line(tmp_path, line, reason):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=rf"metrics.jsonl:2: {reason}"):
        read_metrics(path)


def test_all_sinks_are_closed_even_if_one_fails(tmp_path):
    closed = []

    def fail():
        raise OSError("no network")

    sinks = [Sink(print, lambda: closed.append(1)), Sink(print, fail), Sink(print, lambda: closed.append(3))]
    with pytest.raises(OSError, match="no network"), MetricsLog(tmp_path / "metrics.jsonl", sinks):
        pass
    assert sorted(closed) == [1, 3]


@pytest.mark.parametrize("name, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio",) * 2])
def test_a_missing_package_is_named_with_its_extra_before_anything_opens(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)  # what import sees where it is not installed
    present = {"tensorboard": "wandb"}.get(name, "tensorboard")
    opened = []
    fake = ModuleType("fake")
    fake.SummaryWriter = fake.init = lambda *args, **kwargs: opened.append(args)
    monkeypatch.setitem(sys.modules, logging._TRACKERS[present].package, fake)
    with pytest.raises(ValueError) as error:
        open_sinks([present, name], tmp_path, "run", {})
    assert (
        str(error.value)
        == f'report_to: {name} needs the package {package}: pip install "jaxft[{name}]", or take it out'
    )
    assert opened == list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown tracker 'mlflow'; choose tensorboard, wandb, trackio"):
        open_sinks(["mlflow"], tmp_path, "run", {})


class FakeWandb(ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logged, self.defined, self.finished = [], [], [], 0

    def init(self, **arguments):
        self.inits.append(arguments)
        return SimpleNamespace(
            log=lambda metrics, step=None: self.logged.append((metrics, step)),
            define_metric=lambda *args, **kwargs: self.defined.append((args, kwargs)),
            finish=self.finish,
        )

    def finish(self):
        self.finished += 1


def run_once(names, directory, config=None):
    sinks = open_sinks(names, directory, "first", config or {"lora_r": 16})
    with MetricsLog(directory / "metrics.jsonl", sinks) as log:
        log.log(TRAIN)
        log.log({"step": 11, "loss": math.nan, "note": "text"})
        log.log(EVALUATION)


def test_wandb_gets_every_record_and_resumes_by_id(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    run_once(["wandb"], tmp_path)
    run_once(["wandb"], tmp_path)
    first, second = fake.inits
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("jaxft", "first", "allow")
    assert first["config"] == {"lora_r": 16}
    (train, _), (broken, _), (evaluation, _) = fake.logged[:3]
    assert train == {
        "step": 10,
        "train/loss": 1.2341,
        "train/grad_norm": 0.561,
        "train/learning_rate": 1e-4,
        "train/tokens_per_second": 1234.4,
    }
    assert broken.keys() == {"step", "train/loss"}
    assert math.isnan(broken["train/loss"])
    assert evaluation == {"step": 20, "eval/loss": 1.5}
    assert fake.defined[0] == (("*",), {"step_metric": "step"})
    assert fake.finished == 2
    (tmp_path / "other").mkdir()
    run_once(["wandb"], tmp_path / "other")
    assert fake.inits[2]["id"] != first["id"]


def test_wandb_variables_win(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    variables = {"project": "mine", "name": "named", "run_id": "abc", "resume": "must", "dir": str(tmp_path)}
    for name, value in variables.items():
        monkeypatch.setenv(f"WANDB_{name.upper()}", value)
    run_once(["wandb"], tmp_path)
    variables["id"] = variables.pop("run_id")
    assert variables.items() <= fake.inits[0].items()


def test_trackio_gets_every_record_and_resumes_by_name(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    run_once(["trackio"], tmp_path)
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    run_once(["trackio"], tmp_path)
    first, second = fake.inits
    assert (first["project"], second["project"]) == ("jaxft", "mine")
    assert first["name"] == second["name"]
    assert first["name"].startswith("first-")
    assert first["resume"] == "allow"
    assert fake.logged[2] == ({"eval/loss": 1.5}, 20)
    assert [step for _, step in fake.logged] == [10, 11, 20] * 2
    assert fake.finished == 2


def test_tensorboard_files_hold_every_number(tmp_path):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    run_once(["tensorboard"], tmp_path)
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, events = file.read_bytes(), []
    while data:  # TFRecord: length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    values = [(event.step, value) for event in events for value in event.summary.value]
    scalars = {(step, value.tag): value.simple_value for step, value in values if not value.HasField("tensor")}
    assert scalars.keys() >= {(10, "train/loss"), (10, "train/learning_rate"), (20, "eval/loss")}
    assert scalars[10, "train/loss"] == np.float32(1.2341)
    assert scalars[20, "eval/loss"] == 1.5
    assert math.isnan(scalars[11, "train/loss"])
    assert any(b"lora_r" in value.SerializeToString() for _, value in values)


@pytest.mark.parametrize("name, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio",) * 2])
def test_no_token_of_the_environment_reaches_a_file(tmp_path, monkeypatch, name, package):
    pytest.importorskip(package)
    canaries = {
        "HF_TOKEN": "hf_" + "canary" * 6,
        "HUGGING_FACE_HUB_TOKEN": "hf_" + "yranac" * 6,
        "WANDB_API_KEY": "c0ffee" * 6 + "beef",
    }
    for variable, value in canaries.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run_once([name], tmp_path, {"model_name_or_path": "a/b", "report_to": [name]})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 2
    for path in files:
        assert not [key for key, value in canaries.items() if value.encode() in path.read_bytes()], path


def console(terminal: bool) -> Console:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, force_interactive=terminal, width=100, color_system=None)


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
    clock = iter([100.0, 110.0, 400.0])
    monkeypatch.setattr(logging, "monotonic", lambda: next(clock))
    plain = console(terminal=False)
    with Progress(200, console=plain) as progress:
        progress.update(1)  # compiled: from here on time counts
        progress.update(11, TRAIN)
        progress.message("[bold]saved[/bold] " + "x" * 200)
        progress.update(200, {**TRAIN, "loss": math.nan, "learning_rate": 0.0, "skipped_updates": 2})
    assert plain.file.getvalue().splitlines() == [
        "step 11/200  loss 1.234  grad 0.561  lr 1.0e-4  1234 tok/s  eta 0:03:09",
        "[bold]saved[/bold] " + "x" * 200,
        "step 200/200  loss nan  grad 0.561  lr 0  1234 tok/s  2 skipped  eta 0:00:00",
    ]


def test_the_first_update_of_a_resumed_run_promises_no_time():
    plain = console(terminal=False)
    with Progress(200, initial_step=100, console=plain) as progress:
        progress.update(101, {"step": 101, "loss": 12.0})
    assert plain.file.getvalue() == "step 101/200  loss 12.00  eta ?\n"


def test_a_terminal_shows_a_bar_and_messages_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    screen = console(terminal=True)
    with Progress(200, initial_step=50, console=screen) as progress:
        progress.update(60, TRAIN)
        progress.message("saved [step 60]")
    text = screen.file.getvalue()
    last = text.rsplit("saved [step 60]", 1)[1]
    assert "step 60/200" in last
    assert "loss 1.234  1234 tok/s" in last
    assert "step 50/200" in text.split("saved")[0]


def test_importing_it_imports_no_tracker():
    program = "import sys, jaxft.training.logging; print({'wandb', 'trackio', 'tensorboardX'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
