"""Arrays on the devices of several processes: make them from each process's part, and read them on every process.

A process sees only the parts on its own devices. To read the rest, all processes must compute together, with the same
calls in the same order. With one process these functions simply place and read an array.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.sharding import hosts
from jaxft.sharding.mesh import BATCH_AXES, batch_sharding

Batch = TypeVar("Batch")


def any_process(flags: Sequence[bool], mesh: Mesh) -> list[bool]:
    """Each flag, true if it is true in any process. It is computed on the devices, in order with the steps."""
    if hosts.count() == 1:
        return list(flags)
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    mine = np.array([flags])
    raised = jax.make_array_from_callback((mesh.size, len(flags)), sharding, lambda _: mine)
    return on_host(_any(raised)).tolist()


@jax.jit
def _any(raised: jax.Array) -> jax.Array:
    return raised.any(axis=0)


def on_host(array: jax.Array) -> np.ndarray:
    """The array in host memory. If it is sharded over hosts, all of them must call this to gather it together."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(_gather(array.sharding.mesh)(array))


@functools.cache
def _gather(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=NamedSharding(mesh, P()))


def place(array: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    """The array with this sharding. Either every process has all of it, or the processes hold it together."""
    together = isinstance(array, jax.Array) and not array.is_fully_addressable
    if together or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)  # if each process had all of it, this would send it around to compare
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


@functools.cache
def rows_here(mesh: Mesh, count: int) -> tuple[int, ...]:
    """The rows of a batch of `count` rows that the devices of this process hold."""
    cuts = NamedSharding(mesh, P(BATCH_AXES)).addressable_devices_indices_map((count,)).values()
    return tuple(sorted({row for (cut,) in cuts for row in range(*cut.indices(count))}))


def place_rows(batch: Batch, mesh: Mesh, count: int, leading: int = 0) -> Batch:
    """A batch on the devices, cut as `batch_sharding` says.

    Args:
        batch: arrays [..., rows, T] with the rows of `rows_here`, in their order.
        count: rows of all processes together.
        leading: number of axes before the rows.
    """
    sharding = batch_sharding(mesh, leading)
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    at = {row: number for number, row in enumerate(rows_here(mesh, count))}

    def part(array: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        *outer, cut, tokens = index
        first, end, _ = cut.indices(count)
        return array[(*outer, slice(at[first], at[first] + end - first), tokens)]

    def global_array(array: np.ndarray) -> jax.Array:
        shape = (*array.shape[:leading], count, array.shape[-1])
        return jax.make_array_from_callback(shape, sharding, functools.partial(part, array))

    return jax.tree.map(global_array, batch)
