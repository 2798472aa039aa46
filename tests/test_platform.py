"""What is said to JAX before it starts, and what the user said stays."""

import logging
import os
import subprocess
import sys

import pytest

from jaxft import platform
from jaxft.platform import devices_needed
from jaxft.sharding.jax_internals import DISCOVERY_LOG

SCRIPT = """
import os
import jaxft.platform
jaxft.platform.find_spec = lambda name: name == os.environ.get("PLUGIN")
import jax
with jaxft.platform.prepared():
    print(jax.config.jax_compilation_cache_dir, os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"])
"""
KEPT_IN_HOME = {"PLUGIN": "libtpu", "JAX_PLATFORMS": ""}


@pytest.mark.parametrize(
    "given, directory, fraction",
    [
        ({"JAX_PLATFORMS": ""}, "None", "0.92"),  # there is no compiler but that for CPUs
        ({"PLUGIN": "libtpu", "JAX_PLATFORMS": "cpu"}, "None", "0.92"),
        (KEPT_IN_HOME, "{home}/.cache/jaxft/xla", "0.92"),
        (KEPT_IN_HOME | {"JAX_COMPILATION_CACHE_DIR": "there"}, "there", "0.92"),
        ({"JAX_PLATFORMS": "cpu", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, "None", "0.5"),
    ],
)
def test_settings(tmp_path, given, directory, fraction):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_COMPILATION", "XLA_PYTHON"))}
    environment = kept | {"HOME": str(tmp_path)} | given
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == [directory.format(home=tmp_path), fraction]


RUN = """
import logging
logging.basicConfig(format="%(message)s")
import jax
from jaxft.platform import devices_needed, prepared
before = dict(jax.config.values)
with prepared(), devices_needed():
    draw = jax.random.normal(jax.random.key(7), (3,))
    wide = jax.numpy.arange(3)[:, None] + jax.numpy.arange(2) + jax.numpy.float32(1)
    print(draw.tolist(), wide.dtype, jax.jit(lambda x: x / x)(jax.numpy.zeros(())).item())
assert dict(jax.config.values) == before
"""


def run(given: dict[str, str]) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    command = [sys.executable, "-c", RUN]
    return subprocess.run(
        command, env=kept | {"JAX_PLATFORMS": "cpu"} | given, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def plain() -> str:
    return run({}).stdout


@pytest.mark.parametrize(
    "name, value, shown",
    [
        ("JAX_ENABLE_X64", "1", "True"),
        ("JAX_DEFAULT_PRNG_IMPL", "rbg", "rbg"),
        ("JAX_RANDOM_SEED_OFFSET", "3", "3"),
        ("JAX_NUMPY_RANK_PROMOTION", "raise", "raise"),
        ("JAX_DEBUG_NANS", "true", "True"),
        ("JAX_DISABLE_JIT", "1", "True"),
        ("JAX_TRANSFER_GUARD", "disallow", "disallow"),
        ("JAX_LEGACY_PRNG_KEY", "error", "error"),
    ],
)
def test_settings_of_others_do_not_change_a_run(plain, name, value, shown):
    done = run({name: value})
    assert done.returncode == 0, done.stderr
    assert done.stdout == plain
    assert f"{name} is {shown}; a run needs " in done.stderr


def test_settings_that_change_nothing_are_not_spoken_of(plain):
    assert plain
    for given in ({}, {"JAX_ENABLE_X64": "0"}, {"JAX_NUMPY_DTYPE_PROMOTION": "standard"}, {"JAX_LOG_COMPILES": "0"}):
        done = run(given)
        assert (done.stdout, done.stderr) == (plain, "")


@pytest.mark.parametrize("asked", ["cuda", "tpu", "gpuu", "rocm"])
def test_a_platform_that_is_not_there_is_named_with_what_to_do(asked):
    done = run({"JAX_PLATFORMS": asked, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert f"ValueError: JAX_PLATFORMS is {asked}, and JAX cannot use that here (CUDA_VISIBLE_DEVICES=''): " in last
    assert "or unset JAX_PLATFORMS to take what there is" in last


def test_a_fall_back_to_the_cpu_is_said(monkeypatch, caplog):
    monkeypatch.setattr(platform, "_for_accelerators", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with platform.devices_needed():
        pass
    assert caplog.messages == [
        "JAX sees no accelerator and runs on the CPU, though a plugin for one is installed (CUDA_VISIBLE_DEVICES='')"
    ]


def test_a_plugin_that_finds_no_device_is_told_in_a_line(caplog):
    with devices_needed():
        try:
            raise RuntimeError("no GPU")
        except RuntimeError:
            logging.getLogger(DISCOVERY_LOG).exception("plugin configuration error")
    assert [(one.getMessage(), one.exc_info) for one in caplog.records][:1] == [("plugin configuration error", None)]
