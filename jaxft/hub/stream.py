"""From tensors in files to parameters on devices, with room for a few tensors on the way.

Threads read ahead, in the order of the files and by a bounded number of bytes, while the devices cast or quantize
what was read and write it into its place. Beyond the weights themselves the host holds twice the largest tensor at
most, however large the model is.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from threading import Event
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from jaxft.hub.kept import kept
from jaxft.hub.prequantized import Weights
from jaxft.hub.stack import Storage, add_tensor, finish
from jaxft.models.linear import Weight
from jaxft.models.parameter import Parameter
from jaxft.quantization.qtensor import QTensor
from jaxft.sharding.hosts import is_writer

READERS = 2  # threads
AHEAD = 256 << 20  # bytes that may be on their way beside the largest tensor
PIECE = 16 << 20  # bytes of a file that one thread has mapped at a time
ALIGNMENT = 64  # of memory that XLA's CPU backend takes for an array as it is

Item = TypeVar("Item")
Result = TypeVar("Result")
Cut = tuple[slice, ...]


class Slot(NamedTuple):
    """A tensor of the checkpoint, the parameter it belongs to, and its place there."""

    name: str
    parameter: Parameter
    position: tuple[int, ...]


def load_weights(checkpoint: Weights, storages: Mapping[Parameter, Storage]) -> dict[Parameter, Weight]:
    """The value of every parameter, stored as it says. On a terminal a bar on stderr shows how far it is.

    Codes that a file has in the format that is asked for are taken over.
    """
    order = {name: number for number, name in enumerate(checkpoint.names())}
    slots = [
        Slot(name, parameter, position)
        for parameter in storages
        for name, position in zip(parameter.names, np.ndindex(parameter.stack), strict=True)
    ]
    slots.sort(key=lambda slot: order[slot.name])
    cuts = {parameter: _cuts(parameter, storage) for parameter, storage in storages.items()}

    def size_of(slot: Slot) -> int:
        values = sum(math.prod(axis.stop - axis.start for axis in cut) for cut in cuts[slot.parameter])
        return values * checkpoint.info(slot.name).dtype.itemsize

    def read(slot: Slot, stopped: Event) -> dict[str, np.ndarray] | QTensor:
        storage = storages[slot.parameter]
        codes = None if slot.parameter.transposed else kept(checkpoint, slot.name, storage.form, storage.sharding)
        if codes is not None:
            checkpoint.release(slot.name)
            return codes
        return {str(cut): _read(checkpoint, slot, cut, stopped) for cut in cuts[slot.parameter]}

    weights: dict[Parameter, Weight] = {}
    sizes = [size_of(slot) for slot in slots]
    limit = max(sizes) + min(max(sizes), AHEAD)
    with _progress(sum(sizes)) as bar, closing(read_ahead(read, slots, sizes, limit)) as tensors:
        for slot, size in zip(slots, sizes, strict=True):
            storage = storages[slot.parameter]
            x = _on_devices(next(tensors), slot.parameter.tensor_shape, storage)
            stack = weights.pop(slot.parameter, None)
            weights[slot.parameter] = add_tensor(stack, x, slot.position, storage)
            del x
            bar.advance(bar.task_ids[0], size)
    return {parameter: finish(weight, storages[parameter]) for parameter, weight in weights.items()}


def read_ahead(
    read: Callable[[Item, Event], Result], items: Sequence[Item], sizes: Sequence[int], limit: int
) -> Iterator[Result]:
    """`read` of every item in order, by threads that are ahead of whoever takes the results.

    The sizes of the items begun and not yet done with stay within `limit`; a larger one is read when there is no
    other. Done with is a result when the next one is asked for. An error in `read` is raised in place of its result.
    Closing the iterator waits for the threads, and sets the event that each `read` is given.
    """
    stopped = Event()
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="jaxft-read")
    waiting: deque[tuple[Future[Result], int]] = deque()
    held = begun = 0
    try:
        for _ in items:
            while begun < len(items) and (not waiting or held + sizes[begun] <= limit):
                waiting.append((pool.submit(read, items[begun], stopped), sizes[begun]))
                held += sizes[begun]
                begun += 1
            yield waiting[0][0].result()
            held -= waiting.popleft()[1]
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def _cuts(parameter: Parameter, storage: Storage) -> list[Cut]:
    """The parts of each tensor that this process's devices hold, every one once."""
    shape = parameter.tensor_shape
    if storage.sharding is None:
        return [_bounded((slice(None),) * len(shape), shape)]
    indices = storage.sharding.addressable_devices_indices_map(shape).values()
    return list({str(cut): cut for cut in (_bounded(index, shape) for index in indices)}.values())


def _bounded(index: Cut, shape: tuple[int, ...]) -> Cut:
    return tuple(slice(*axis.indices(size)[:2]) for axis, size in zip(index, shape, strict=True))


def _read(checkpoint: Weights, slot: Slot, cut: Cut, stopped: Event) -> np.ndarray:
    """A copy of a part of a tensor, aligned for XLA. The pages of the file are given back on the way."""
    transposed = slot.parameter.transposed
    part = checkpoint.read(slot.name, (*cut[:-2], cut[-1], cut[-2]) if transposed else cut)
    memory = np.empty(part.nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    copy = memory[start : start + part.nbytes].view(part.dtype)
    copy = copy.reshape([axis.stop - axis.start for axis in cut])
    bits = f"u{part.itemsize}"  # other dtypes than numpy's own are copied under the interpreter's lock
    source, target = part.view(bits), (copy.swapaxes(-1, -2) if transposed else copy).view(bits)
    rows = max(1, PIECE * len(part) // max(1, part.nbytes))
    for row in range(0, len(part), rows):
        if stopped.is_set():
            break
        target[row : row + rows] = source[row : row + rows]
        checkpoint.release(slot.name)
    return copy


def _on_devices(parts: dict[str, np.ndarray] | QTensor, shape: tuple[int, ...], storage: Storage) -> Weight:
    if isinstance(parts, QTensor):
        return parts
    if storage.sharding is None:
        (part,) = parts.values()
        return jax.device_put(part)
    return jax.make_array_from_callback(shape, storage.sharding, lambda index: parts[str(_bounded(index, shape))])


def _progress(total: int) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not (console.is_interactive and is_writer()))
    bar.add_task("", total=total)
    return bar
