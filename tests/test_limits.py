"""Refused memory and full disks are told as such, whichever library met them."""

import errno
import mmap
import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import AutoTokenizer, LlamaConfig

from jaxft.cli.command import exit_code
from jaxft.data.chat import load_tokenizer
from jaxft.hub.model_files import read_json
from jaxft.hub.safetensors import SafetensorsFile
from jaxft.limits import NoMemoryError, memory_for, memory_limit, writing
from jaxft.models.hf_config import decoder_config
from jaxft.training.logging import MetricsLog, read_metrics

pytestmark = pytest.mark.core

REFUSED = [
    lambda: MemoryError(),
    lambda: OSError(errno.ENOMEM, "Cannot allocate memory"),
    lambda: MemoryError("Unable to allocate 3 GiB"),
    lambda: RuntimeError("can't start new thread"),
    lambda: ImportError("/x/_core.so: failed to map segment from shared object"),
]


def raising(make):
    def fail(*args, **kwargs):
        raise make()

    return fail


def wrapping(make):
    """Fails as libraries do that put an error of their own around the cause."""

    def fail(*args, **kwargs):
        try:
            raise make()
        except Exception as error:
            raise ValueError("cannot load it") from error

    return fail


@contextmanager
def small_files():
    """No file may grow beyond 100 bytes."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("refused", REFUSED)
def test_refused_memory_names_what_it_was_for(refused):
    for fail in (raising(refused), wrapping(refused)):
        with pytest.raises(NoMemoryError, match=r"^weights: no memory for it: "), memory_for("weights"):
            fail()
    with pytest.raises(NoMemoryError, match=r"^inside: "), memory_for("outside"), memory_for("inside"):
        raise refused()


def test_other_errors_are_left_alone():
    for error in (ValueError("x"), OSError(errno.ENOSPC, "No space"), KeyError("memory")):
        with pytest.raises(type(error)) as raised, memory_for("weights"):
            raise error
        assert raised.value is error


def test_the_limit_that_was_met_is_named(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2_000_000_000, resource.RLIM_INFINITY))
    assert "limited to 2.0 GB; lift the limit (`ulimit -v unlimited`" in memory_limit()
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_limit().startswith(f"this host has {whole / 1e9:.1f} GB in all; ")


@pytest.mark.parametrize("refused", REFUSED)
def test_no_file_is_called_damaged_for_want_of_memory(tmp_path, monkeypatch, refused):
    path = tmp_path / "model.safetensors"
    save_file({"x": np.zeros(3, np.float32)}, path)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(LlamaConfig, "from_dict", raising(refused))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", raising(refused))
    monkeypatch.setattr(mmap, "mmap", raising(refused))
    monkeypatch.setattr(Path, "read_text", raising(refused))
    for named, read in (
        ("config.json", lambda: decoder_config({"model_type": "llama"})),
        (tmp_path, lambda: load_tokenizer(tmp_path)),
        (path, lambda: SafetensorsFile(path)),
        (tmp_path / "config.json", lambda: read_json(tmp_path / "config.json")),
    ):
        with pytest.raises(NoMemoryError) as raised:
            read()
        assert str(raised.value).startswith(f"{named}: no memory for it: ")


@pytest.mark.parametrize(
    "error, code, line",
    [
        (lambda: NoMemoryError("weights: no memory for it: buy some"), 2, "error: weights: no memory for it: buy some"),
        (lambda: MemoryError(), 2, "error: no memory left: "),
        (lambda: OSError(errno.ENOMEM, "Cannot allocate memory"), 2, "error: no memory left ([Errno 12] Cannot "),
        (lambda: RuntimeError("can't start new thread"), 2, "error: no memory left (can't start new thread): "),
        (lambda: OSError(errno.EACCES, "Permission denied", "/x/y"), 2, "error: /x/y: Permission denied\n"),
        (
            lambda: OSError(errno.ENOSPC, "/x could not be written: full"),
            2,
            "error: /x could not be written: full\n",
        ),
        (lambda: ValueError("plain"), 2, "error: plain\n"),
        (
            lambda: jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nmore"),
            1,
            "error: no memory left on a device: Out of memory allocating 7 bytes; scripts/plan.py ",
        ),
    ],
)
def test_a_command_says_it_in_one_line(capsys, error, code, line):
    assert exit_code(raising(error)) == code
    told = capsys.readouterr().err
    assert told.startswith(line)
    assert told.count("\n") == 1


def test_another_error_of_a_device_keeps_its_traceback():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        exit_code(raising(lambda: jax.errors.JaxRuntimeError("INTERNAL: RESOURCE_EXHAUSTED: no")))


def writing_fails(code, then):
    with writing("a/b", then):
        raise OSError(code, os.strerror(code))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_with_the_file_and_what_to_do(code):
    with pytest.raises(OSError, match=r"a/b could not be written: .+; make room there; then resume$") as raised:
        writing_fails(code, "; then resume")
    assert raised.value.errno == code
    with pytest.raises(OSError, match=r"a/b could not be written: Permission denied$"):
        writing_fails(errno.EACCES, "")


def test_metrics_on_a_full_disk_name_their_file_and_go_on_from_there(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def log(*steps):
        with MetricsLog(path) as metrics:
            for step in steps:
                metrics.log({"step": step, "loss": 1.23456789})

    expected = r"metrics\.jsonl could not be written: File too large; make room there; then resume$"
    with small_files(), pytest.raises(OSError, match=expected):
        log(1, 2, 3, 4, 5)
    kept = [record["step"] for record in read_metrics(path)]
    assert kept == [1, 2, 3], "whole lines, and no part of the one that did not fit"
    log(4)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]
