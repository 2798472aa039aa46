"""Digests of arrays that no host need hold whole.

A digest is a sum, modulo 2^32, over the elements of an array: of a mix of the element's bits and its place. Sums of
integers are exact in any order, so the devices add up what they hold, and the result does not depend on how the array
is cut over them. Four sums with constants of their own are kept. A single changed element always changes them, since
the mix is one to one in the bits; other damage goes unnoticed with a probability of about 2^-128. They are no
protection against someone who means to deceive.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_LANES = ((0x9E3779B1, 0x85EBCA77), (0xC2B2AE3D, 0x27D4EB2F), (0x165667B1, 0xD3A2646D), (0xFD7046C5, 0xB55A4F09))
"""For each sum odd factors of the bits and of the place."""


class Digest(NamedTuple):
    """What is known of an array: its digest as 32 hexadecimal digits, and whether all its values are finite."""

    sums: str
    finite: bool


def digests(arrays: Mapping[str, jax.Array]) -> dict[str, Digest]:
    """By name. Processes that share arrays call it together, and all get the same."""
    return {name: _digest(array) for name, array in arrays.items()}


def _digest(array: jax.Array) -> Digest:
    # One after the other: on a CPU, programs that wait for several devices and not for each other can lock each other
    # out of the threads that they need.
    *sums, strange = jax.device_get(_sums(array))
    return Digest("".join(f"{int(total):08x}" for total in sums), int(strange) == 0)


@jax.jit
def _sums(array: jax.Array) -> tuple[jax.Array, ...]:
    """The four sums, and how many values are not finite, in one pass; uint32."""
    zero = jnp.uint32(0)
    strange = jnp.zeros(array.shape, bool)
    if jnp.issubdtype(array.dtype, jnp.inexact):
        strange = ~jnp.isfinite(array)
    bits = _bits(array)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    terms = [_mix(bits * jnp.uint32(odd) + place * jnp.uint32(other)) for odd, other in _LANES]
    strange = jnp.broadcast_to(strange.reshape(strange.shape + (1,) * (bits.ndim - strange.ndim)), bits.shape)
    operands = (*terms, strange.astype(jnp.uint32))

    def add(left: tuple, right: tuple) -> tuple:
        return tuple(a + b for a, b in zip(left, right, strict=True))

    return jax.lax.reduce(operands, (zero,) * len(operands), add, tuple(range(bits.ndim)))


def _bits(array: jax.Array) -> jax.Array:
    """uint32; elements of 64 bits become two, along a last axis."""
    if array.dtype == bool:
        return array.astype(jnp.uint32)
    width = min(np.dtype(array.dtype).itemsize, 4) * 8
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{width}")).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """One to one, and every bit of the result depends on all of x (the finalizer lowbias32 of C. Wellons)."""
    x ^= x >> jnp.uint32(16)
    x *= jnp.uint32(0x7FEB352D)
    x ^= x >> jnp.uint32(15)
    x *= jnp.uint32(0x846CA68B)
    return x ^ (x >> jnp.uint32(16))
