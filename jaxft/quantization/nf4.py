"""4-bit NormalFloat: sixteen levels at the quantiles of a normal distribution, one scale to 64 columns.

The format of QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3; levels in appendix E).
If rows are whole blocks, codes and scales equal those of bitsandbytes bit for bit. For other widths
bitsandbytes lets blocks run on from one row into the next. Here each row ends in its own short block, so that
rows can be sharded. That costs at most one more scale for each row.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.quantization import blocks, nested
from jaxft.quantization.qtensor import QTensor

LEVELS = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
_MIDPOINTS = (LEVELS[:-1] + LEVELS[1:]) / np.float32(2)


@dataclasses.dataclass(frozen=True)
class NF4:
    """uint4 codes, indices into LEVELS; scales `[..., out, ceil(in / 64)]`; w = LEVELS[code] * absmax.

    The scales are the f32 absmax of the blocks or, with `double_quant`, their 8-bit codes (see `nested`).
    """

    double_quant: bool = False
    block_in = 64

    def encode(self, w: jax.Array) -> QTensor:
        absmax = blocks.absmax(w, self.block_in)
        x = w.astype(jnp.float32) * blocks.spread(blocks.reciprocal(absmax), self.block_in, w.shape[-1])
        codes = sum((x > middle).astype(jnp.int32) for middle in _MIDPOINTS).astype(jnp.uint4)
        if self.double_quant:
            return QTensor(codes, *nested.encode(absmax), format=self)
        return QTensor(codes, absmax, format=self)

    def decode(self, q: QTensor) -> jax.Array:
        return _levels(q.codes) * blocks.spread(self.plain(q).scales, self.block_in, q.shape[-1])

    def plain(self, q: QTensor) -> QTensor:
        """The same weight without double quantization: its scales are f32."""
        if not self.double_quant:
            return q
        return QTensor(q.codes, nested.decode(q.scales, q.nested_absmax, q.nested_offset), format=NF4())


def _levels(codes: jax.Array) -> jax.Array:
    """LEVELS[codes]. Gathers are slow on TPU. Elsewhere, inside a scan, the tree of selects falls apart into passes
    over whole arrays (CPU), or its constants become arrays of the weight's size that outlive the loop (GPU)."""
    return jax.lax.platform_dependent(codes, tpu=_selected, default=_looked_up)


def _looked_up(codes: jax.Array) -> jax.Array:
    return jnp.asarray(LEVELS).at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


def _selected(codes: jax.Array) -> jax.Array:
    """A tree of selects on the four bits."""
    codes = codes.astype(jnp.int32)
    values = list(LEVELS)
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        values = [jnp.where(is_set, odd, even) for even, odd in zip(values[::2], values[1::2], strict=True)]
    return values[0]
