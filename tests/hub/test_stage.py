"""Directories that appear whole, and what a killed process leaves of one."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.hub.stage import clear_stale, staged, staged_in

HOLD = """
import sys, time
from pathlib import Path
from jaxft.hub.stage import staged, staged_in
with {how}(Path(sys.argv[1])) as stage:
    (stage / "half").write_text("half of it")
    print(stage, flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["staged", "staged_in"])
def holder(request, tmp_path):
    """(process, output, stage): a process that is writing what belongs at `output`."""
    output = tmp_path / "result"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(how=request.param), str(output)], stdout=subprocess.PIPE, text=True
    )
    stage = Path(process.stdout.readline().strip())
    yield process, output, stage
    process.kill()
    process.communicate()


def test_what_a_killed_process_left_goes_and_what_one_writes_stays(holder):
    process, _, stage = holder
    assert (stage / "half").exists()
    assert clear_stale(stage.parent) == []
    assert (stage / "half").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (stage / "half").exists()
    assert clear_stale(stage.parent) == [stage]
    assert not stage.exists()


def test_the_next_write_removes_what_a_killed_one_left(holder):
    process, output, stage = holder
    process.send_signal(signal.SIGKILL)
    process.wait()
    how = staged_in if stage.name.startswith(".jaxft.") else staged
    with how(output) as mine:
        (mine / "whole").write_text("all of it")
        assert not stage.exists()
    assert {path.name for path in output.iterdir()} == {"whole"}


def test_nothing_else_is_removed(tmp_path):
    """Neither files of others, nor what writes something else in the same place."""
    kept = [".hidden", ".config.tmp", "adapter.12345678.tmp", ".adapter.1234567.tmp", ".adapter.12345678.tmp.bak"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / ".file.12345678.tmp").write_text("a file")
    (tmp_path / ".link.12345678.tmp").symlink_to(tmp_path / ".hidden")
    (tmp_path / ".model.0a1b2c3d.tmp").mkdir()
    assert clear_stale(tmp_path, ".adapter.") == []
    assert clear_stale(tmp_path / "absent") == []
    assert clear_stale(tmp_path) == [tmp_path / ".model.0a1b2c3d.tmp"]
    assert {path.name for path in tmp_path.iterdir()} == {*kept, ".file.12345678.tmp", ".link.12345678.tmp"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_with_the_path(tmp_path, code):
    with pytest.raises(OSError) as error, staged(tmp_path / "out"):
        raise OSError(code, os.strerror(code))
    expected = f"{tmp_path / 'out'} could not be written: {os.strerror(code)}; make room there"
    assert str(error.value) == f"[Errno {code}] {expected}"
    with pytest.raises(OSError) as error, staged(tmp_path / "out") as stage, staged_in(stage):
        raise OSError(code, os.strerror(code))
    assert str(error.value) == f"[Errno {code}] {expected}"
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_followed(tmp_path):
    """To an empty directory, or to where one is to be."""
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        link = tmp_path / f"to {name}"
        link.symlink_to(tmp_path / name)
        with staged(link) as stage:
            (stage / "whole").write_text("all of it")
        assert link.is_symlink()
        assert (tmp_path / name / "whole").read_text() == "all of it"
    with (
        pytest.raises(ValueError, match="empty is not empty; choose another --output"),
        staged(link.with_name("to empty")),
    ):
        pass


@pytest.mark.parametrize("name", ["file/out", "file/deeper/out"])
def test_a_file_in_the_way_is_named(tmp_path, name):
    (tmp_path / "file").write_text("x")
    expected = f"{tmp_path / name} cannot be written: {tmp_path / 'file'} is a file; choose another --output"
    with pytest.raises(ValueError) as error, staged(tmp_path / name):
        pass
    assert str(error.value) == expected


@pytest.mark.parametrize("how", [staged, staged_in])
def test_what_cannot_be_written_is_named_as_it_was_asked_for(tmp_path, monkeypatch, how):
    """Not by the name of the directory beside it, of which nobody knows."""
    (tmp_path / "out").mkdir()

    make = Path.mkdir

    def refuse(self, *args, **options):
        if self.suffix == ".tmp":
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        make(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError) as error, how(tmp_path / "out"):
        pass
    assert error.value.strerror == f"{tmp_path / 'out'} could not be written: Read-only file system"
    assert error.value.filename is None


def test_other_errors_pass_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"), staged(tmp_path / "out"):
        (tmp_path / "gone").read_text()
    assert list(tmp_path.iterdir()) == []
