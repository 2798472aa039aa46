"""Attention on a mesh (DeepSpeed-Ulysses, arXiv 2309.14509): outside attention tokens are cut, inside it heads.

Between layers each device of the axis `context` has some of the tokens of a row. Attention needs whole rows, but
heads are independent. An all-to-all gives each device all tokens of some heads, the kernel runs as on one device, and
an all-to-all brings the tokens back. All devices have the same work, whatever causality hides.

Heads are already cut over `tensor`; each device's part is cut further over `context`. If there are fewer key-value
heads than parts, each is repeated as often as needed.

Axes: B batch, T tokens, N query heads, K key-value heads, H head_dim.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxft.sharding.layout import ways
from jaxft.sharding.mesh import BATCH_AXES, batch_ways

HEADS = ("tensor", "context")
"""The axes that heads are cut over inside attention."""

Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None], jax.Array]
"""(q, k, v, segments, sinks) -> out, for whole rows of some heads."""


def spread(
    kernel: Kernel,
    mesh: Mesh,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """Run `kernel` for q [B, T, N, H], k and v [B, T, K, H], each device on its part: [B, T, N, H].

    N must divide by tensor * context. Rows that do not fill the devices are padded. If the tokens of a row do not
    divide by `context`, every device has all of them outside attention too.

    Args:
        segments: [B, T] int32; each device gets the segments of its whole rows.
        sinks: [N]; each device gets the sinks of its heads.
    """
    count, length = q.shape[:2]
    missing = -count % batch_ways(mesh)
    k, v = (_repeated(x, ways(mesh, "tensor")) for x in (k, v))
    q, k, v = (jnp.pad(x, ((0, missing), (0, 0), (0, 0), (0, 0))) for x in (q, k, v))
    segments = None if segments is None else jnp.pad(segments, ((0, missing), (0, 0)))

    parts = mesh.shape["context"]
    tokens_are_cut = parts > 1 and length % parts == 0
    if not tokens_are_cut:
        k, v = (_repeated(x, ways(mesh, HEADS)) for x in (k, v))

    def part(q, k, v, segments, sinks):
        if not tokens_are_cut:
            return kernel(q, k, v, segments, sinks)
        k, v = (_repeated(x, parts) for x in (k, v))
        whole_rows = (jax.lax.all_to_all(x, "context", 2, 1, tiled=True) for x in (q, k, v))
        return jax.lax.all_to_all(kernel(*whole_rows, segments, sinks), "context", 1, 2, tiled=True)

    cut = P(BATCH_AXES, "context", "tensor") if tokens_are_cut else P(BATCH_AXES, None, HEADS)
    specs = (cut, cut, cut, P(BATCH_AXES), P(HEADS))
    run = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=cut, check_vma=False)
    return run(q, k, v, segments, sinks)[:count]


def _repeated(x: jax.Array, parts: int) -> jax.Array:
    """x [B, T, K, H] with each head repeated as often as it takes for K to divide by `parts`."""
    times = parts // math.gcd(x.shape[2], parts)
    return x if times == 1 else jnp.repeat(x, times, axis=2)
