"""All settings that JAX and XLA need before they touch a device, in one place.

Settings in the user's environment are kept, except those that a run's numbers depend on (`REQUIRED`): people leave
settings of other programs in their shells, and 64-bit types or another random generator would make it another run.
These are set to the required values while the run lasts, and a warning names them.

- Compiled programs are cached in `~/.cache/jaxft/xla` (`JAX_COMPILATION_CACHE_DIR`; `JAX_ENABLE_COMPILATION_CACHE=0`
  turns it off), so that a run that restarts or resumes does not compile again. The cache is off if JAX can compile for
  CPUs only, which takes seconds: XLA was seen to crash while it wrote a CPU program (jax 0.10.2), in processes with so
  many programs that they may have reached their limit of memory maps.
- On an NVIDIA GPU a program may take 92 % of the memory (`XLA_PYTHON_CLIENT_MEM_FRACTION`). JAX's default of 75 % is
  for sharing the GPU with others; the remaining 8 % are for CUDA itself and the libraries' workspaces.

XLA's flags keep their defaults: the flags that guides recommend, the latency-hiding scheduler and asynchronous
collectives, are already on (seen in steps compiled for eight H100s and for v5e).
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import jax

from jaxft.sharding.jax_internals import DISCOVERY_LOG

GPU_MEMORY = 0.92
"""The share of a GPU's memory that programs may take."""

CACHE = "~/.cache/jaxft/xla"


REQUIRED = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_numpy_rank_promotion": "allow",
    "jax_legacy_prng_key": "allow",
    "jax_debug_key_reuse": False,
    "jax_disable_jit": False,
    "jax_no_tracing": False,
    "jax_no_execution": False,
    "jax_check_tracer_leaks": False,
    "jax_debug_nans": False,  # updates that are not finite are counted and skipped
    "jax_debug_infs": False,
    "jax_transfer_guard": "allow",
}
"""Settings of JAX that a run's numbers depend on, or without which a run does not work."""

HIDING = (
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "TPU_VISIBLE_CHIPS",
    "TPU_VISIBLE_DEVICES",
)
"""Environment variables that hide devices from JAX."""

logger = logging.getLogger(__name__)


@contextmanager
def prepared() -> Iterator[None]:
    """Apply the settings. Enter it before JAX touches a device."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY))
    if jax.config.jax_compilation_cache_dir is None and _for_accelerators():
        jax.config.update("jax_compilation_cache_dir", str(Path(CACHE).expanduser()))
    found = {name: getattr(jax.config, name, None) for name in REQUIRED}
    changed = {name: value for name, value in found.items() if value not in (None, REQUIRED[name])}
    for name, value in changed.items():
        logger.warning("%s is %s; a run needs %s, and takes it", name.upper(), value, REQUIRED[name])
        jax.config.update(name, REQUIRED[name])
    try:
        yield
    finally:
        for name, value in changed.items():
            jax.config.update(name, value)


@contextmanager
def devices_needed() -> Iterator[None]:
    """Wrap code that makes JAX look for devices.

    Raises:
        ValueError: JAX finds none, or none of the platform that JAX_PLATFORMS names; the message says what to do.
    """
    discovery = logging.getLogger(DISCOVERY_LOG)
    discovery.addFilter(_without_traceback)
    try:
        yield
    except (RuntimeError, AssertionError) as error:  # AssertionError: there is no plugin for CUDA
        asked = jax.config.jax_platforms
        reason = (str(error).splitlines() or ["there is no plugin for it"])[0]
        if not asked:
            raise ValueError(f"JAX finds no device{_hidden()}: {reason}") from None
        raise ValueError(
            f"JAX_PLATFORMS is {asked}, and JAX cannot use that here{_hidden()}: {reason}; install jax for it "
            '(pip install "jax[tpu]", "jax[cuda13]"), or unset JAX_PLATFORMS to take what there is'
        ) from None
    finally:
        discovery.removeFilter(_without_traceback)
    if jax.default_backend() == "cpu" and _for_accelerators():
        logger.warning("JAX sees no accelerator and runs on the CPU, though a plugin for one is installed%s", _hidden())


def _without_traceback(record: logging.LogRecord) -> bool:
    """JAX logs a traceback if a plugin finds no device; the line of text is enough."""
    record.exc_info = record.exc_text = None
    return True


def _hidden() -> str:
    """The set variables that may hide devices from JAX, as the end of a sentence."""
    found = [f"{name}={os.environ[name]!r}" for name in HIDING if name in os.environ]
    return f" ({' and '.join(found)})" if found else ""


def _for_accelerators() -> bool:
    """Whether programs may be compiled for an accelerator."""
    if jax.config.jax_platforms == "cpu":
        return False
    plugins = ("libtpu", "jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
    return any(find_spec(name) for name in plugins if "." not in name or find_spec("jax_plugins"))
