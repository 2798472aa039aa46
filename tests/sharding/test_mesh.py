"""Sizes that make a mesh of the eight devices, and what is said of those that do not."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest

from jaxft.sharding.mesh import arranged, make_mesh


@pytest.mark.parametrize(
    "sizes, shape",
    [
        ({"data": 8}, (8, 1, 1, 1, 1)),
        ({"data": -1, "fsdp": 2}, (4, 2, 1, 1, 1)),
        ({"fsdp": 2, "tensor": -1, "data": 2}, (2, 2, 1, 1, 2)),
        ({"expert": 4, "fsdp": -1}, (1, 2, 4, 1, 1)),
        ({"context": 2, "fsdp": -1}, (1, 4, 1, 2, 1)),
        ({"data": -1, "fsdp": 8}, (1, 8, 1, 1, 1)),
    ],
)
def test_one_axis_takes_the_devices_that_remain(sizes, shape):
    mesh = make_mesh(sizes)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "expert", "context", "tensor"), shape, strict=True))
    assert mesh.size == 8


@pytest.mark.parametrize(
    "sizes, count, message",
    [
        (
            {"data": -1, "fsdp": 3},
            1,
            r"fsdp=3 x expert=1 x context=1 x tensor=1: 3 does not divide the number of devices, 1; .* to 1$",
        ),
        ({"data": -1, "fsdp": 3}, 8, r"3 does not divide the number of devices, 8; .* to 1 or 2 or 4 or 8$"),
        ({"data": -1, "fsdp": 2, "tensor": 2}, 6, r"4 does not divide the number of devices, 6; .* 1 or 2 or 3 or 6$"),
        ({"data": -1, "fsdp": 16}, 8, "16 does not divide the number of devices, 8"),
        ({"data": 3}, 8, "data=3 x fsdp=1 x expert=1 x context=1 x tensor=1 is 3 devices, but there are 8"),
        ({"data": -1, "fsdp": -1}, 8, "-1 on at most one axis"),
        ({"data": 0}, 8, "sizes are positive"),
        ({"model": 8}, 8, r"unknown axes \['model'\]; known: data, fsdp, expert, context, tensor"),
    ],
)
def test_sizes_that_do_not_fit(sizes, count, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(sizes, jax.devices()[:count])


@dataclass(frozen=True)
class Gpu:
    """What is asked of a device to arrange it."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "GPU"

    @property
    def process_index(self):
        return self.slice_index


@pytest.mark.parametrize(
    "shape, between",
    [
        ((2, 4, 1, 1, 1), [0]),  # data
        ((4, 1, 1, 1, 2), [0]),
        ((1, 8, 1, 1, 1), [1]),  # fsdp, as data has room for none
        ((1, 2, 1, 1, 4), [1]),
    ],
)
def test_hosts_lie_along_the_first_axes(shape, between):
    """Along every other axis, all devices are of one host."""
    devices = [Gpu(index, index // 4) for index in range(8)]
    found = np.vectorize(lambda device: device.slice_index)(arranged(shape, devices[::-1]))
    assert found.shape == shape
    for axis in range(5):
        crosses = (np.diff(found, axis=axis) != 0).any()
        assert crosses == (axis in between)


def test_hosts_that_do_not_divide_the_mesh():
    devices = [Gpu(index, index // 2) for index in range(6)]
    assert arranged((3, 2, 1, 1, 1), devices).shape == (3, 2, 1, 1, 1)
    with pytest.raises(ValueError, match=r"3 slices or hosts do not divide the axes \{'data': 1, 'fsdp': 1"):
        arranged((1, 1, 1, 1, 1), devices)
