"""What is said to JAX before it starts, and what the user said stays."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os
import jaxft.platform
jaxft.platform.find_spec = lambda name: name == os.environ.get("PLUGIN")
jaxft.platform.prepare()
import jax
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
