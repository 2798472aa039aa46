"""What is said to JAX before it starts, and what the user said stays."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os
from jaxft.platform import prepare
prepare()
import jax
print(jax.config.jax_compilation_cache_dir, os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"])
jax.jit(lambda x: sum((x @ x + i for i in range(300)), x))(jax.numpy.ones((8, 8))).block_until_ready()
"""


@pytest.mark.parametrize(
    "given", [{}, {"JAX_COMPILATION_CACHE_DIR": "elsewhere", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}]
)
def test_settings(tmp_path, given):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_COMPILATION", "XLA_PYTHON"))}
    home = {"HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    given = {key: str(tmp_path / value) if "DIR" in key else value for key, value in given.items()}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=kept | home | given, capture_output=True, text=True, timeout=120, check=True
    )
    directory, fraction = done.stdout.split()
    assert directory == given.get("JAX_COMPILATION_CACHE_DIR", str(tmp_path / ".cache" / "jaxft" / "xla"))
    assert fraction == given.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    assert any(name.endswith("-cache") for name in os.listdir(directory))
