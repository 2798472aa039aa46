"""Scales in eight bits: the second quantization of QLoRA's "double quantization".

The absmax values of one weight matrix, minus their mean, are cut row-major into blocks of 256; each value
divided by the absmax of its block is rounded to the nearest of the 256 values of the dynamic map. Order and
rounding are those of bitsandbytes, so that equal weights give equal bits:

* the mean adds up as torch does on one x86 thread (`_mean`). From 32768 blocks on (2M weights) torch splits
  the sum among its threads, a GPU adds in its own order, and both then differ by an ulp or two; the
  offset is stored, so a different mean costs no accuracy.
* nearest is decided at the midpoints, as the CUDA kernel and the pure torch operation do. The C++ kernel for
  CPU rounds through a table of 65536 bins instead, which gives a few values in a thousand another code.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxft.quantization import blocks

_BLOCK = 256


def dynamic_map() -> np.ndarray:
    """The 256 ascending f32 values of the signed dynamic 8-bit type in [-1, 1].

    Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization" (https://arxiv.org/abs/2110.02861),
    section 1.3: seven decades, the e-th with 2**e values evenly spaced in (0.1, 1) * 10**(e - 6), their
    negatives, 0 and 1. Rounded as torch's vectorized linspace rounds, with fused multiply-adds.
    """
    one, tenth = np.float32(1), np.float32(0.1)
    positive = []
    for e in range(7):
        n = 2**e
        step, i = np.float64((one - tenth) / np.float32(n)), np.arange(n + 1)
        edges = np.where(i < (n + 1) // 2, tenth + step * i, one - step * (n - i)).astype(np.float32)
        positive.append(np.float32(10.0 ** (e - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2)))
    values = np.concatenate(positive)
    return np.concatenate([-values[::-1], np.zeros(1, np.float32), values, np.ones(1, np.float32)])


_MAP = dynamic_map()
_MIDPOINTS = (_MAP[:-1] + _MAP[1:]) / np.float32(2)
_ZERO = int(np.flatnonzero(_MAP == 0)[0])


def encode(absmax: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """f32 `[..., out, n]` to uint8 codes of that shape, absmax `[..., ceil(out * n / 256)]`, mean `[...]`."""
    flat = absmax.reshape(*absmax.shape[:-2], -1)
    offset = _mean(flat)
    centred = flat - offset[..., None]
    scales = blocks.absmax(centred, _BLOCK)
    x = centred * blocks.spread(blocks.reciprocal(scales), _BLOCK, flat.shape[-1])
    codes = jnp.searchsorted(_MIDPOINTS, x).astype(jnp.uint8)
    return codes.reshape(absmax.shape), scales, offset


def decode(codes: jax.Array, scales: jax.Array, offset: jax.Array) -> jax.Array:
    """The f32 absmax values `[..., out, n]` that `encode` stored."""
    spread = blocks.spread(scales, _BLOCK, codes.shape[-1] * codes.shape[-2]).reshape(codes.shape)
    values = jnp.asarray(_MAP).at[codes.astype(jnp.int32)].get(mode="promise_in_bounds") * spread
    # The select changes no value. It stands between product and sum because compilers contract the two to one
    # fused multiply-add, which rounds once where the format rounds twice.
    return jnp.where(codes == _ZERO, 0.0, values) + offset[..., None, None]


def _mean(x: jax.Array) -> jax.Array:
    """Mean over the last axis, `[..., n]` to `[...]`, adding in the order of torch's sum on one x86 thread.

    torch adds vectors of 8 lanes in 4 interleaved columns, each column as a cascade (`_cascade`), then the
    vectors left over, the columns, the scalars left over and the lanes.
    """
    n = x.shape[-1]
    lanes = 8 if n >= 8 else 1
    vectors, scalars = jnp.split(x, [n // lanes * lanes], axis=-1)
    vectors = vectors.reshape(*x.shape[:-1], -1, lanes)
    rows = vectors.shape[-2] // 4
    table, extra = jnp.split(vectors, [rows * 4], axis=-2)
    columns = _cascade(table.reshape(*x.shape[:-1], rows, 4, lanes))
    vector = _fold(jnp.concatenate([columns[..., :1, :], extra, columns[..., 1:, :]], axis=-2), -2)
    total = _fold(jnp.concatenate([scalars, vector], axis=-1), -1)
    # If XLA saw the divisor, it would multiply with the reciprocal, which rounds twice.
    return total / jnp.where(jnp.isnan(total), total, float(n))


def _cascade(x: jax.Array) -> jax.Array:
    """Sum over the axis -3, in runs of at least 16, then runs of the runs' sums, four levels deep."""
    rows = x.shape[-3]
    run = 2 ** max(4, (rows - 1).bit_length() // 4)
    for _ in range(3):
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, -x.shape[-3] % run), (0, 0), (0, 0)])
        x = _fold(x.reshape(*x.shape[:-3], -1, run, *x.shape[-2:]), -3)
    return _fold(x, -3)


def _fold(x: jax.Array, axis: int) -> jax.Array:
    """Sum over `axis`, strictly from first to last."""
    x = jnp.moveaxis(x, axis, 0)
    return lax.scan(lambda total, term: (total + term, None), jnp.zeros(x.shape[1:], x.dtype), x)[0]
