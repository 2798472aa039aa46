"""Find out whether this process is one of several, and which one.

The environment says so: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or what
JAX understands of SLURM, Open MPI, Cloud TPU and Kubernetes. Nothing is started, and no process is waited for, before
it is clear that there is more than one process.
"""

import logging
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxft.sharding.jax_internals import clusters

logger = logging.getLogger(__name__)

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
CONNECT_SECONDS = 300
"""How long processes wait for one another when they start."""

Environment = Mapping[str, str]


class Place(NamedTuple):
    """This process among those of a run: arguments of `jax.distributed.initialize`."""

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None  # None: those in JAX_LOCAL_DEVICE_IDS, else all of the host


def find() -> Place | None:
    """The place of this process; None if it is the only one.

    The JAX_* variables take precedence over a detected cluster. JAX_NUM_PROCESSES=1 means a process on its own, even
    inside a cluster.

    Raises:
        ValueError: the variables do not make sense, or a cluster does not give the facts that are needed.
    """
    env = os.environ
    count, index = _integer(env, COUNT), _integer(env, INDEX)
    if count == 1:
        return None
    if count is not None and index is not None and env.get(ADDRESS):
        return _checked(Place(env[ADDRESS], count, index, None))
    cluster = _detected(env)
    if cluster is None:
        return _nowhere(env)
    try:
        count = cluster.get_process_count() if count is None else count
        if count == 1:
            return None
        address = env.get(ADDRESS) or cluster.get_coordinator_address(
            timeout_secs=CONNECT_SECONDS, override_coordinator_port=env.get("JAX_COORDINATOR_PORT")
        )
        index = cluster.get_process_id() if index is None else index
        local = cluster.get_local_process_id()
    except (OSError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"a cluster is detected ({cluster.__name__}), but not which of its processes this is: {error}; "
            f"set {ADDRESS}, {COUNT} and {INDEX}, or {COUNT}=1 for a process on its own"
        ) from error
    all_devices = local is None or "JAX_LOCAL_DEVICE_IDS" in env or _processes_on_host(env) == 1
    return _checked(Place(address, count, index, None if all_devices else [local]))


def _nowhere(env: Environment) -> None:
    """No cluster is detected: raise ValueError if a variable still says that there are other processes."""
    given = [name for name in (ADDRESS, COUNT, INDEX) if env.get(name)]
    if env.get("OMPI_COMM_WORLD_SIZE", "1") != "1":  # since version 5 Open MPI does not tell where process 0 is
        given.append("OMPI_COMM_WORLD_SIZE")
    if given:
        missing = [name for name in (ADDRESS, COUNT, INDEX) if not env.get(name)]
        raise ValueError(
            f"{' and '.join(given)} say that this process is one of several, and no cluster is detected that says the "
            f"rest: set {' and '.join(missing)} too, or {COUNT}=1 for a process on its own"
        )


def _detected(env: Environment) -> type | None:
    """The cluster that JAX would choose.

    JAX would ask Kubernetes in any pod, but only the pods of an indexed job have a number.
    """
    known = clusters()
    for kind in known.kinds:
        if kind is known.kubernetes and "JOB_COMPLETION_INDEX" not in env:
            continue
        try:
            if kind.is_env_present():
                return kind
        except OSError as error:  # a TPU without a metadata server
            logger.warning(
                "%s: no metadata server (%s), so this process is taken to be on its own; else set %s, %s and %s",
                *(kind.__name__, type(error).__name__, ADDRESS, COUNT, INDEX),
            )
    return None


def _processes_on_host(env: Environment) -> int | None:
    """How many processes SLURM or Open MPI started on this host; None if they do not say.

    JAX assumes that each process has one GPU. But a process that is alone on its host has them all.
    """
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in env:
        return int(env["OMPI_COMM_WORLD_LOCAL_SIZE"])
    counts: list[int] = []
    for entry in filter(None, env.get("SLURM_STEP_TASKS_PER_NODE", "").split(",")):  # as in 2(x3),1
        parsed = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)
        if parsed is None:
            return None
        counts += [int(parsed[1])] * int(parsed[2] or 1)
    node = int(env.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else None


def _integer(env: Environment, name: str) -> int | None:
    text = env.get(name, "")
    if not text:
        return None
    if not text.isdecimal():
        raise ValueError(f"{name} is {text!r}; it must be a whole number")
    return int(text)


def _checked(place: Place) -> Place:
    if not 0 <= place.process_id < place.num_processes:
        raise ValueError(
            f"process {place.process_id} of {place.num_processes}: processes are numbered from 0 ({INDEX}, {COUNT})"
        )
    if not re.fullmatch(r".+:\d+", place.coordinator_address):
        raise ValueError(f"{ADDRESS} is {place.coordinator_address!r}; it must be host:port of process 0")
    return place
