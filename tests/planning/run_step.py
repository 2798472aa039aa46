"""Runs two real updates of a config on the CPU, and prints what they took: `python run_step.py MODEL [key=value ...]`.

The peak of this process' resident memory above what it was before the arrays were made, beside the plan's total.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxft.config_file import load_config
from jaxft.models.hf_config import decoder_config
from jaxft.planning.abstract import AbstractStep
from jaxft.planning.machines import topology
from jaxft.planning.plan import make_plan
from jaxft.sharding.mesh import make_mesh


def resident(kind: str) -> int:
    """VmRSS or VmHWM (the peak), bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def real(like: jax.ShapeDtypeStruct) -> jax.Array:
    value = 1 if not jnp.issubdtype(like.dtype, jnp.floating) else 0.01
    return jax.jit(lambda: jnp.full(like.shape, value, like.dtype), out_shardings=like.sharding)()


def main(model: str, *overrides: str) -> None:
    base = {"model_name_or_path": model, "output_dir": "runs/none", "datasets": ["none"]}
    config, decoder = load_config(base, overrides), decoder_config(json.loads(Path(model).read_text()))
    machine = topology("cpu:1")
    planned = make_plan(config, decoder, machine).memory.total
    abstract = AbstractStep(config, decoder, make_mesh({"data": 1}, machine.devices))
    state, frozen, batch = jax.tree.map(real, (abstract.state, abstract.frozen, abstract.batch))
    state, _ = abstract.step(state, frozen, batch)  # compiles
    jax.block_until_ready(state)
    del state, frozen, batch
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    state, frozen, batch = jax.block_until_ready(jax.tree.map(real, (abstract.state, abstract.frozen, abstract.batch)))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for _ in range(2):
        state, metrics = abstract.step(state, frozen, batch)
    assert jnp.isfinite(jax.block_until_ready(metrics.loss))
    print(json.dumps({"planned": planned, "allocated": resident("VmHWM") - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
