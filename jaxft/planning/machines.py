"""Machines by name: what they can do, and devices to compile for that need not exist here.

`v5e:4x4` is a slice of TPUs by its shape, `h100:8` a number of GPUs, `cpu:8` devices of this host. A compiler for
another machine is a plugin of JAX, installed with an extra; it needs neither that machine nor its driver.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

import jax
import yaml
from jax.experimental import topologies

from jaxft.platform import GPU_MEMORY

_LIBTPU = {  # libtpu must only compile: not look for the TPUs of this host, nor block them for other processes
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}

EXTRAS = {"tpu": ("libtpu", "tpu"), "cuda": ("jax_plugins.xla_cuda13", "cuda13")}
"""Platform -> the module that compiles for it, and the extra that installs it."""


class PlanError(ValueError):
    """A machine that cannot be planned for."""


class CompilerMissingError(PlanError):
    """Its compiler is not installed."""


@dataclass(frozen=True)
class Machine:
    """The facts of one device in `machines.yaml`, which explains them. Units are bytes and seconds throughout."""

    name: str
    platform: str
    memory: int
    flops: float
    bandwidth: float
    ici: float
    dcn: float
    host: int
    cuda: Mapping[str, Any] | None = None

    @property
    def capacity(self) -> int:
        """Bytes of a device that a program may take."""
        return int(self.memory * GPU_MEMORY) if self.platform == "cuda" else self.memory


@dataclass(frozen=True)
class Topology:
    """Devices of a machine."""

    machine: Machine
    devices: Sequence[jax.Device]


@cache
def machines() -> dict[str, Machine]:
    known = yaml.safe_load((files("jaxft.planning") / "machines.yaml").read_text())
    return {name: Machine(name, **facts) for name, facts in known.items()}


def topology(name: str) -> Topology:
    """The devices that a name like `v5e:4x4`, `2*v5e:4x4` (slices), `h100:8` or `cpu:4` stands for.

    Raises:
        PlanError: no such machine, or its compiler is not installed.
    """
    form = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", name)
    kinds = {"cpu", *machines()}
    if form is None or form[2] not in kinds:
        raise PlanError(
            f"{name!r} is no machine; write v5e:4x4 (a slice of TPUs), 2*v5e:4x4 (two of them), h100:8 (GPUs), cpu:4; "
            f"known are {', '.join(sorted(kinds))}"
        )
    slices, kind, shape = int(form[1] or 1), form[2], [int(size) for size in form[3].split("x")]
    if kind == "cpu":
        return _host(shape)
    machine = machines()[kind]
    module, extra = EXTRAS[machine.platform]
    if not _installed(module):
        raise CompilerMissingError(
            f"to plan for {kind}, install its compiler: pip install 'jaxft[{extra}]' (no such device needed)"
        )
    if machine.platform == "tpu":
        return Topology(machine, _tpu(machine, shape, slices))
    if slices > 1 or len(shape) > 1:
        raise PlanError(f"{name!r}: GPUs are counted, as in {kind}:8; hosts have {machine.host} of them")
    count = shape[0]
    hosts = max(1, count // machine.host)
    if count > machine.host and count % machine.host:
        raise PlanError(
            f"{name!r}: hosts have {machine.host} of these GPUs, so it is one host, or {machine.host}, 16, ..."
        )
    try:
        described = topologies.get_topology_desc(
            platform="cuda", topology_name=kind, target_config=_target(machine), topology=f"1x{hosts}x{count // hosts}"
        )
    except NotImplementedError as error:  # JAX looked for GPUs, found no driver and dropped its GPU compiler
        raise PlanError(
            f"{name}: set JAX_PLATFORMS=cpu before JAX starts, as scripts/plan.py does ({error})"
        ) from error
    return Topology(machine, described.devices)


def _installed(module: str) -> bool:
    parent = module.rpartition(".")[0]
    return (not parent or find_spec(parent) is not None) and find_spec(module) is not None


def _host(shape: Sequence[int]) -> Topology:
    count, there = math.prod(shape), jax.devices("cpu")
    if count > len(there):
        raise PlanError(f"cpu:{count}: JAX has {len(there)} CPU devices here; set JAX_NUM_CPU_DEVICES={count}")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // count
    # About two cores of a server: for tests of the planner, not for choosing a CPU.
    return Topology(Machine("cpu", "cpu", memory, 5e11, 2e10, 5e9, 1e9, count), there[:count])


def _tpu(machine: Machine, shape: Sequence[int], slices: int) -> Sequence[jax.Device]:
    chips = math.prod(shape)
    bounds = {"chips_per_host_bounds": [1] * 3} if chips == 1 else {}
    many = {"num_slices": slices} if slices > 1 else {}
    name = f"{machine.name}:{'x'.join(map(str, shape))}"
    with _environment(_LIBTPU):
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds, **many).devices
        except Exception as error:  # libtpu raises its own
            raise PlanError(f"{name} is no slice that there is: {error}") from error


@contextmanager
def _environment(variables: Mapping[str, str]):
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _target(machine: Machine) -> str:
    """A GpuTargetConfigProto of XLA (xla/stream_executor/device_description.proto), as text."""
    gpu = machine.cuda
    major, minor = gpu["capability"]
    features = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
gpu_device_info {{
  name: "{gpu["name"]}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
  core_count: {gpu["cores"]}
  fpus_per_core: {gpu["units"]}
  threads_per_core_limit: {gpu["threads"]}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu["shared"]}
  shared_memory_per_block_optin: {gpu["shared"] - 1024}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: {int(machine.bandwidth)}
  l2_cache_size: {gpu["l2"]}
  clock_rate_ghz: {gpu["clock"]}
  device_memory_size: {machine.memory}
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu["name"]}"
"""
