"""How scripts begin: whatever becomes of their output, and whenever a signal comes."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FAKE = """
import sys, types
fake = types.ModuleType("jaxft.cli.fake")
sys.modules["jaxft.cli.fake"] = fake
def main():
{body}
    return 3
fake.main = main
from jaxft.cli.start import start
sys.exit(start("fake"))
"""


def command(*body: str) -> list[str]:
    """A command that does this and exits with 3."""
    return [sys.executable, "-c", FAKE.format(body="".join(f"    {line}\n" for line in body))]


TALK = command(
    "import time",
    "for number in range(200):",
    "    print('x' * 1000, number)",
    "    sys.stdout.flush()",
    "open('done', 'w').close()",
)


def run(words: list[str], cwd: Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run(words, cwd=cwd, timeout=60, text=True, **options)


# Nobody listens


@pytest.mark.parametrize("lost", ["stdout", "stderr", "both"])
def test_a_pipe_whose_reader_left_ends_nothing(tmp_path, lost):
    read, write = os.pipe()
    os.close(read)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    streams |= {name: write for name in streams if lost in (name, "both")}
    body = ["for _ in range(3):", "    print('told', flush=True)", "    print('warned', file=sys.stderr, flush=True)"]
    done = run(command(*body, "open('done', 'w').close()"), tmp_path, **streams)
    os.close(write)
    assert done.returncode == 3
    assert (tmp_path / "done").exists()
    word = f"WARNING: {lost} is lost (Broken pipe); the command goes on without it\n"
    if lost == "stdout":
        assert done.stderr == word + "warned\n" * 3
    if lost == "stderr":
        assert done.stdout == "told\n" + word + "told\n" * 2


def test_a_full_disk_behind_stdout_ends_nothing(tmp_path):
    with open("/dev/full", "w") as full:
        done = run(TALK, tmp_path, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 3
    assert (tmp_path / "done").exists()
    assert done.stderr == "WARNING: stdout is lost (No space left on device); the command goes on without it\n"


def test_a_terminal_that_closes_ends_nothing(tmp_path):
    ours, theirs = pty.openpty()
    wait = ["import time", "while not __import__('os').path.exists('go'): time.sleep(0.01)"]
    process = subprocess.Popen(
        command(*wait, "print('x')", "open('done', 'w').close()"), cwd=tmp_path, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    os.close(ours)
    (tmp_path / "go").touch()
    assert process.wait(60) == 3
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_what_is_closed_is_not_taken_by_a_file(tmp_path, closed):
    body = ["with open('file', 'w') as file:", "    print('told'); sys.stdout.flush(); print('x', file=sys.stderr)"]
    (tmp_path / "script.py").write_text(command(*body)[2])
    done = run(["sh", "-c", f"{sys.executable} script.py {closed}"], tmp_path, capture_output=True)
    assert done.returncode == 3
    assert (tmp_path / "file").read_text() == ""


def test_a_pipe_that_does_not_wait_loses_nothing(tmp_path):
    read, write = os.pipe()
    os.set_blocking(write, False)
    process = subprocess.Popen(TALK, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    time.sleep(0.5)
    with open(read) as pipe:
        assert len(pipe.read().splitlines()) == 200
    assert process.wait(60) == 3
    assert process.stderr.read() == b""


# What a console cannot show


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"PYTHONIOENCODING": "ascii"}, b"\\u27e6 \\xe9 \\U0001f426 \\udc80\n"),
        ({"PYTHONIOENCODING": "ascii:strict"}, b"\\u27e6 \\xe9 \\U0001f426 \\udc80\n"),
        ({"PYTHONIOENCODING": "cp1252"}, b"\\u27e6 \xe9 \\U0001f426 \\udc80\n"),
        ({"PYTHONIOENCODING": "utf-8"}, "⟦ é 🐦 \\udc80\n".encode()),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, b"\\u27e6 \\xe9 \\U0001f426 \\udc80\n"),
    ],
)
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_characters_that_a_console_does_not_know_are_escaped(tmp_path, environment, expected, stream):
    body = f"print({'⟦ é 🐦 '!a} + chr(0xDC80), file=sys.{stream})"
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHONIO"))}
    done = subprocess.run(command(body), env=kept | environment, capture_output=True, timeout=60)
    assert getattr(done, stream) == expected
    assert done.returncode == 3


# Signals


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_during_imports_ends_at_once_with_a_word(tmp_path, name):
    """Libraries swallow what is raised while they are imported."""
    body = ["print('started')", "sys.stdout.flush()", "while True:", "    try:", "        while True: pass"]
    process = subprocess.Popen(
        command(*body, "    except BaseException: pass"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "started\n"
    number = signal.Signals[name]
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert process.stderr.read() == ("interrupted\n" if name == "SIGINT" else f"stopped by {name}\n")


def test_ignored_hangups_stay_ignored(tmp_path):
    """As under nohup."""
    body = ["import os, signal", "os.kill(os.getpid(), signal.SIGHUP)", "open('done', 'w').close()"]
    (tmp_path / "script.py").write_text(command(*body)[2])
    done = run(["sh", "-c", f"trap '' HUP; exec {sys.executable} script.py"], tmp_path)
    assert done.returncode == 3
    assert (tmp_path / "done").exists()


# Settings that are none


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
def test_libraries_that_find_no_room_are_one_line(tmp_path):
    script = Path(__file__).resolve().parents[2] / "scripts" / "train.py"
    done = run(["sh", "-c", f"ulimit -v 1000000; exec {sys.executable} {script} --help"], tmp_path, capture_output=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no memory left")
    assert "limited to 1.0 GB; lift the limit (`ulimit -v unlimited`" in line


@pytest.mark.parametrize("setting", ["JAX_ENABLE_X64=maybe", "JAXFT_HEARTBEAT_SECONDS=a minute"])
def test_a_setting_that_is_not_understood_is_one_line(tmp_path, setting):
    script = Path(__file__).resolve().parents[2] / "scripts" / "generate.py"
    name, _, value = setting.partition("=")
    done = run([sys.executable, str(script), "--help"], tmp_path, capture_output=True, env=os.environ | {name: value})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert setting in line
