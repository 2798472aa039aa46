"""What is said to JAX and XLA before they touch a device: all such settings, in one place.

What the user has set, in the environment, stays as it is.

- Compiled programs are kept in `~/.cache/jaxft/xla` (`JAX_COMPILATION_CACHE_DIR`; `JAX_ENABLE_COMPILATION_CACHE=0`
  for none), so that a run that starts again, or goes on, does not compile again. Not so where there is no compiler but
  that for CPUs, which is done in seconds: XLA was seen to crash while it wrote a CPU program down (jax 0.10.2), in
  processes of so many programs that they may have been at the end of their memory maps.
- On an NVIDIA GPU a program may take 92 % of the memory (`XLA_PYTHON_CLIENT_MEM_FRACTION`). JAX's own 75 % are for
  sharing the GPU with others; what is left is for CUDA itself and the libraries' workspaces.

XLA's flags are left at their defaults: those that guides recommend, the latency-hiding scheduler and asynchronous
collectives, are on already (seen in steps compiled for eight H100s and for v5e).
"""

import os
from importlib.util import find_spec
from pathlib import Path

import jax

GPU_MEMORY = 0.92
"""Of a GPU's memory, what programs may take."""

CACHE = "~/.cache/jaxft/xla"


def prepare() -> None:
    """Make the settings; to be called before JAX touches a device."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY))
    if jax.config.jax_compilation_cache_dir is None and _for_accelerators():
        jax.config.update("jax_compilation_cache_dir", str(Path(CACHE).expanduser()))


def _for_accelerators() -> bool:
    """Whether programs may be compiled for others than the CPU."""
    if jax.config.jax_platforms == "cpu":
        return False
    plugins = ("libtpu", "jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
    return any(find_spec(name) for name in plugins if "." not in name or find_spec("jax_plugins"))
