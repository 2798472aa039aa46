"""What is said to JAX and XLA before they touch a device: all such settings, in one place.

What the user has set, in the environment, stays as it is, but for what a run's numbers rest on (`REQUIRED`): people
leave settings of other programs in their shells, and with 64-bit types or another generator it would not be the same
run. Those are put back while the run lasts, and a warning names them.

- Compiled programs are kept in `~/.cache/jaxft/xla` (`JAX_COMPILATION_CACHE_DIR`; `JAX_ENABLE_COMPILATION_CACHE=0`
  for none), so that a run that starts again, or goes on, does not compile again. Not so where there is no compiler but
  that for CPUs, which is done in seconds: XLA was seen to crash while it wrote a CPU program down (jax 0.10.2), in
  processes of so many programs that they may have been at the end of their memory maps.
- On an NVIDIA GPU a program may take 92 % of the memory (`XLA_PYTHON_CLIENT_MEM_FRACTION`). JAX's own 75 % are for
  sharing the GPU with others; what is left is for CUDA itself and the libraries' workspaces.

XLA's flags are left at their defaults: those that guides recommend, the latency-hiding scheduler and asynchronous
collectives, are on already (seen in steps compiled for eight H100s and for v5e).
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
"""Of a GPU's memory, what programs may take."""

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
"""Settings of JAX with which a run's numbers are its own, and with which it works at all."""

HIDING = (
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "TPU_VISIBLE_CHIPS",
    "TPU_VISIBLE_DEVICES",
)
"""Variables that keep devices from JAX."""

logger = logging.getLogger(__name__)


@contextmanager
def prepared() -> Iterator[None]:
    """Make the settings; to be entered before JAX touches a device."""
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
    """Around what makes JAX look for devices.

    Raises:
        ValueError: there are none of the platform that JAX_PLATFORMS names; says what to do.
    """
    discovery = logging.getLogger(DISCOVERY_LOG)
    discovery.addFilter(_without_traceback)
    try:
        yield
    except (RuntimeError, AssertionError) as error:  # the latter where there is no plugin for CUDA
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
    """JAX tells of a plugin that finds no device with a traceback; the line is enough."""
    record.exc_info = record.exc_text = None
    return True


def _hidden() -> str:
    """Which variables may keep devices from JAX, as the end of a sentence."""
    found = [f"{name}={os.environ[name]!r}" for name in HIDING if name in os.environ]
    return f" ({' and '.join(found)})" if found else ""


def _for_accelerators() -> bool:
    """Whether programs may be compiled for others than the CPU."""
    if jax.config.jax_platforms == "cpu":
        return False
    plugins = ("libtpu", "jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
    return any(find_spec(name) for name in plugins if "." not in name or find_spec("jax_plugins"))
