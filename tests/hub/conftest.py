"""Writes that fail, for the writer of a file and the writer of a checkpoint alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxft.hub.safetensors import SafetensorsError
from jaxft.hub.safetensors_writer import ArraySpec

Producer = Callable[[str], np.ndarray]


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """`snapshot(directory)`: name -> bytes of every file in it."""
    return lambda directory: {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(params=[
    pytest.param((RuntimeError("device lost"), "device lost"), id="error"),
    pytest.param((KeyboardInterrupt("stop"), "stop"), id="interrupt"),
    pytest.param((np.zeros((2, 3), np.float32),
                  r"'b': announced as float32 \(3, 2\), produced as float32 \(2, 3\)"), id="shape"),
    pytest.param((np.zeros((3, 2), np.float64), r"'b': announced as float32 .* produced as float64"), id="dtype"),
])  # fmt: skip
def failing_write(request) -> tuple[dict[str, ArraySpec], Producer, type[BaseException], str]:
    """(specs, produce, error, told): three tensors of 24 bytes; the second raises, or is another than announced."""
    fault, told = request.param

    def produce(name: str) -> np.ndarray:
        if name != "b":
            return np.ones((3, 2), np.float32)
        if isinstance(fault, BaseException):
            raise fault
        return fault

    specs = {name: jax.ShapeDtypeStruct((3, 2), jnp.float32) for name in "abc"}
    return specs, produce, SafetensorsError if isinstance(fault, np.ndarray) else type(fault), told


@pytest.fixture(params=[
    pytest.param(({"a": np.zeros(2, np.complex64)}, {}, "tensor 'a': the format has no dtype complex64"), id="complex"),
    pytest.param(({"a": np.zeros(2, ml_dtypes.int4)}, {}, "no dtype int4"), id="int4"),
    pytest.param(({"../a": np.zeros(2)}, {}, "tensor '../a': not an acceptable name"), id="path"),
    pytest.param(({"a\ud800": np.zeros(2)}, {}, "cannot be written"), id="surrogate"),
    pytest.param(({"__metadata__": np.zeros(2)}, {}, "cannot be written"), id="reserved"),
    pytest.param(({"a": np.zeros(2)}, {"metadata": {"rank": 8}}, "strings to strings"), id="metadata"),
    pytest.param(({"a": jax.ShapeDtypeStruct((1 << 50,), jnp.uint8)}, {}, "the disk has"), id="space"),
])  # fmt: skip
def impossible_write(request) -> tuple[dict[str, ArraySpec], Producer, dict[str, Any], str]:
    """(specs, produce, options, told): refused without asking `produce` for anything."""
    specs, options, told = request.param

    def produce(name: str) -> np.ndarray:
        raise AssertionError("asked for a tensor")

    return specs, produce, options, told
