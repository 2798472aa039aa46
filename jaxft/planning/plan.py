"""The plan of a run: its step compiled for a machine, and what that says about memory, network and time."""

import math
import re
import time
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from jaxft.config import Config
from jaxft.models.config import DecoderConfig
from jaxft.models.kernels import Choice
from jaxft.planning.abstract import AbstractStep, bytes_per_device
from jaxft.planning.cost import Times, Work, times, work
from jaxft.planning.hlo import Collective, Program
from jaxft.planning.machines import Topology
from jaxft.sharding.mesh import batch_ways, make_mesh

GIB = 1 << 30


@dataclass(frozen=True)
class Memory:
    """Bytes of one device. `temporaries` are activations and all else that exists only while a step runs."""

    base: int
    adapters: int
    optimizer: int
    gradients: int
    temporaries: int
    total: int


@dataclass(frozen=True)
class Plan:
    """The result of planning. `program` is None if the compiler gave up because the step needs too much memory."""

    topology: Topology
    config: Config
    mesh: dict[str, int]
    attention: Choice
    memory: Memory
    compile_seconds: float
    program: Program | None
    work: Work
    times: Times
    tokens: int

    @property
    def fits(self) -> bool:
        return self.program is not None and self.memory.total <= self.topology.machine.capacity

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def collectives(self) -> list[Collective]:
        return [] if self.program is None else self.program.collectives(self.mesh)

    @property
    def tokens_per_second_per_device(self) -> float:
        return self.tokens / self.times.step / self.devices

    def to_json(self) -> dict[str, Any]:
        return {
            "fits": self.fits,
            "capacity_bytes": self.topology.machine.capacity,
            "per_device_bytes": asdict(self.memory),
            "mesh": self.mesh,
            "micro_batch_size": self.config.micro_batch_size,
            "gradient_accumulation_steps": self.config.gradient_accumulation_steps,
            "remat": self.config.remat,
            "attention": self.attention.kernel,
            "collectives": [each._asdict() | {"axes": list(each.axes)} for each in self.collectives],
            "model_flops": self.work.model_flops,
            "hardware_flops": self.work.hardware_flops,
            "step_seconds": self.times.step,
            "tokens_per_second_per_device": self.tokens_per_second_per_device,
            "bound_by": self.times.bound_by,
            "compile_seconds": self.compile_seconds,
        }


def make_plan(config: Config, decoder: DecoderConfig, topology: Topology) -> Plan:
    """Compile the config's step for the machine.

    Raises:
        ValueError: the mesh does not fit the devices, or the model; or `offload` is set for a GPU: JAX compiles for
            absent GPUs as if they had no host.
    """
    if config.offload and topology.machine.platform == "cuda":
        raise ValueError("offload: what goes to the host is not known of GPUs that are not here; plan without it")
    mesh = make_mesh(config.mesh.model_dump(), topology.devices)
    step = AbstractStep(config, decoder, mesh)
    sizes = dict(mesh.shape)
    began = time.monotonic()
    try:
        compiled, short = step.compile(), None
    except jax.errors.JaxRuntimeError as error:
        compiled, short = None, _total_wanted(error)
    seconds = time.monotonic() - began
    rows = config.micro_batch_size * batch_ways(mesh)
    updates = config.gradient_accumulation_steps
    trained = bytes_per_device(step.state.trained)
    full, kernel = config.adapter == "none", step.attention.kernel
    done = work(step.model, rows, config.max_length, updates, full, kernel, trained)
    program = None if compiled is None else Program.parse(compiled.as_text())
    sent = [] if program is None else program.collectives(sizes)
    slow = slow_axes(mesh, topology)
    return Plan(
        topology,
        config,
        sizes,
        step.attention,
        memory_of(step, compiled, short),
        seconds,
        program,
        done,
        times(done, sent, topology.machine, mesh.size, slow),
        rows * config.max_length * updates,
    )


def memory_of(step: AbstractStep, compiled: jax.stages.Compiled | None, wanted: int | None = None) -> Memory:
    """The memory of the compiled step; or, if the compiler gave up, with the total that it wanted."""
    trained = bytes_per_device(step.state.trained)
    optimizer = bytes_per_device(step.state.optimizer)
    full = step.config.adapter == "none"
    base = bytes_per_device(step.frozen) + (trained if full else 0)
    adapters = 0 if full else trained
    if compiled is None:
        total = wanted
    else:
        stats = compiled.memory_analysis()
        kept = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
        total = max(stats.peak_memory_in_bytes, kept + stats.temp_size_in_bytes)
    temporaries = max(total - base - adapters - optimizer - trained, 0)
    return Memory(base, adapters, optimizer, trained, temporaries, total)


def _total_wanted(error: jax.errors.JaxRuntimeError) -> int:
    """Bytes that a program needs, from the compiler's refusal; any other error is raised again."""
    text = str(error)
    found = re.search(r"Used ([\d.]+)([GMK]) of", text) or re.search(r"\(([\d.]+)([GMK])\) exceeds", text)
    if "RESOURCE_EXHAUSTED" not in text or found is None:
        raise error
    return int(float(found[1]) * {"G": 1 << 30, "M": 1 << 20, "K": 1 << 10}[found[2]])


def slow_axes(mesh: jax.sharding.Mesh, topology: Topology) -> set[str]:
    """Mesh axes that join different TPU slices, or different hosts with GPUs."""
    part = "process_index" if topology.machine.platform == "cuda" else "slice_index"
    where = np.vectorize(lambda device: getattr(device, part, 0), otypes=[int])(mesh.devices)
    return {name for axis, name in enumerate(mesh.axis_names) if (np.diff(where, axis=axis) != 0).any()}
