"""The device mesh: `data` replicates the model, `fsdp` cuts its storage, `expert` gives each device some of the
experts, `context` cuts the tokens of a row, `tensor` cuts matrix products. Rows of a batch are cut over the first
three."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices. Axes left out have size 1; one axis may be -1 and takes the devices that remain.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or do not divide it where one axis is -1.
    """
    devices = jax.devices() if devices is None else list(devices)
    unknown = set(sizes) - set(AXES)
    if unknown:
        raise ValueError(f"mesh: unknown axes {sorted(unknown)}; known: {', '.join(AXES)}")
    shape = [sizes.get(axis, 1) for axis in AXES]
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise ValueError(f"mesh: sizes are positive, or -1 on at most one axis; got {dict(sizes)}")
    fixed = math.prod(size for size in shape if size != -1)
    described = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if -1 in shape:
        if len(devices) % fixed:
            divisors = [str(size) for size in range(1, len(devices) + 1) if len(devices) % size == 0]
            raise ValueError(
                f"mesh: {described}: {fixed} does not divide the number of devices, {len(devices)}; "
                f"the axes that are not -1 may multiply to {' or '.join(divisors)}"
            )
        shape[shape.index(-1)] = len(devices) // fixed
    if math.prod(shape) != len(devices):
        raise ValueError(f"mesh: {described} is {math.prod(shape)} devices, but there are {len(devices)}")
    return Mesh(arranged(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arranged(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices as an array of this shape, where neighbours are near each other in the network.

    A slower network joins TPU slices, and hosts with GPUs. They lie along the first axes that they divide: `data`,
    where little is sent, then `fsdp`.

    Raises:
        ValueError: the slices do not divide these axes.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    outside, left = [], slices
    for size in shape:
        outside.append(math.gcd(size, left))
        left //= outside[-1]
    if left > 1:
        raise ValueError(f"mesh: {slices} slices or hosts do not divide the axes {dict(zip(AXES, shape, strict=True))}")
    inside = [size // parts for size, parts in zip(shape, outside, strict=True)]
    if slices == 1:
        return mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(inside, outside, devices, allow_split_physical_axes=True)


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """The sharding of arrays [B, T, ...]: rows over data, fsdp and expert, tokens over context, everything else whole.
    `leading` axes (accumulation) come before the rows."""
    return NamedSharding(mesh, P(*(None,) * leading, BATCH_AXES, "context"))


def row_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """The sharding of arrays [B, ...]: rows as in `batch_sharding`, each row whole."""
    return NamedSharding(mesh, P(*(None,) * leading, BATCH_AXES))


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
