"""The output head in pieces: its arrays, and the chunks of their rows that one device multiplies.

The loss visits the head's rows itself, so it takes the arrays without the module. It needs to know which arrays are
trained, and how each is cut on the mesh.

The vocabulary is cut over tensor and fsdp, over tensor alone, or not. A cut over fsdp is gathered, one chunk at a time.
If the vocabulary is not cut over tensor, the devices along tensor split each chunk, so that each multiplies other rows.
If the columns are cut over tensor instead, these devices exchange a chunk's columns for its rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxft.models.embedding import Embedding
from jaxft.models.linear import Linear
from jaxft.sharding.layout import names_of

Arrays = tuple[jax.Array, ...]

ALIGNED = 128
"""Large chunks have a multiple of this many rows, which suits matrix units."""


@dataclass(frozen=True)
class Head:
    """How to compute logits from the head's arrays. It holds no arrays itself.

    Attributes:
        logits: (trained arrays, frozen arrays, h [C, D]) -> [C, rows] float32. Arrays with a vocabulary axis may be
            reduced to any rows of it, the same in all.
        trained, frozen: how each array is cut on the mesh. Axis 0 is the vocabulary, cut alike in all arrays; None for
            an array without that axis.
        mesh: None if there is one device.
    """

    logits: Callable[[Sequence[jax.Array], Sequence[jax.Array], jax.Array], jax.Array]
    trained: tuple[P | None, ...]
    frozen: tuple[P | None, ...]
    mesh: Mesh | None = None


def pieces(
    module: Linear | Embedding,
    project: Callable[[Linear | Embedding, jax.Array], jax.Array],
    trained_type: type[nnx.Variable],
) -> tuple[Head, Arrays, Arrays]:
    """An output head as a `Head`, its trained arrays and its frozen arrays.

    Args:
        module: may carry an adapter.
        project: gives logits [..., V] from a head and hidden states [..., D].
        trained_type: the type of the trained variables.
    """
    module, layout = nnx.clone(module), module.layout
    module.layout = None  # the loss gathers rows itself
    adapter = module.adapter if isinstance(module, Linear) else None
    if adapter is not None:
        adapter.unbind()
    graph, *states = nnx.split(module, trained_type, ...)
    flat = [jax.tree_util.tree_flatten_with_path(state) for state in states]
    by_row = P(None if layout is None else layout.stored[0])

    def cut(path: tuple) -> P | None:
        *owners, name = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if owners:  # the adapter's
            return by_row if name in adapter.by_output else None
        return layout.stored if name == "weight" and layout is not None else by_row

    def logits(trained, frozen, h):
        parts = (jax.tree.unflatten(tree, leaves) for (_, tree), leaves in zip(flat, (trained, frozen), strict=True))
        return project(nnx.merge(graph, *parts), h)

    cuts = (tuple(cut(path) for path, _ in leaves) for leaves, _ in flat)
    arrays = (tuple(leaf for _, leaf in leaves) for leaves, _ in flat)
    return Head(logits, *cuts, None if layout is None else layout.mesh), *arrays


class Chunks(NamedTuple):
    """Chunk j takes the stored rows from `start(j)` on of each of `parts` devices; `sharers` devices split it.

    All chunks have one size. So the last one may begin with rows of the one before, which are not `fresh`.
    """

    mesh: Mesh | None
    names: tuple[str, ...]  # mesh axes that the vocabulary is cut over
    stored: int  # rows on this device
    size: int  # rows of a chunk from each part, for each sharer
    count: int

    @classmethod
    def of(cls, head: Head, arrays: Sequence[jax.Array], limit: int) -> "Chunks":
        """The chunks of one device's shards of the arrays, with at most `limit` rows to multiply at a time."""
        cuts = (*head.trained, *head.frozen)
        cut, stored = next((cut, array.shape[0]) for cut, array in zip(cuts, arrays, strict=True) if cut is not None)
        chunks = cls(head.mesh, names_of(cut, 0), stored, 1, 1)
        limit = max(1, limit // chunks.parts)
        count = max(-(-stored // (chunks.sharers * limit)), 1 if stored % chunks.sharers == 0 else 2)
        size = -(-stored // (chunks.sharers * count))
        size = min(-(-size // ALIGNED) * ALIGNED, limit, stored // chunks.sharers)
        return chunks._replace(size=size, count=-(-stored // (chunks.sharers * size)))

    @property
    def parts(self) -> int:
        return self.mesh.shape["fsdp"] if "fsdp" in self.names else 1

    @property
    def sharers(self) -> int:
        return 1 if self.mesh is None or "tensor" in self.names else self.mesh.shape["tensor"]

    @property
    def span(self) -> int:
        """Stored rows that a chunk takes."""
        return self.size * self.sharers

    def start(self, j: jax.Array) -> jax.Array:
        return jnp.minimum(j * self.span, self.stored - self.span)

    def own_start(self, j: jax.Array) -> jax.Array:
        """The stored row at which this device's share begins."""
        return self.start(j) + (jax.lax.axis_index("tensor") * self.size if self.sharers > 1 else 0)

    def fresh(self, j: jax.Array) -> jax.Array:
        """Which rows of chunk j are in no earlier chunk: [rows]."""
        return jnp.tile(self.own_start(j) + jnp.arange(self.size) >= j * self.span, self.parts)

    def position(self, j: jax.Array, tokens: jax.Array) -> jax.Array:
        """The index in chunk j of the row of each token [C]: [C]; -1 if it is not in the chunk, or not fresh."""
        first = jax.lax.axis_index("tensor") * self.parts * self.stored if "tensor" in self.names else 0
        part, row = jnp.divmod(tokens - first, self.stored)
        place = row - self.own_start(j)
        here = (part >= 0) & (part < self.parts) & (place >= 0) & (place < self.size) & (row >= j * self.span)
        return jnp.where(here, part * self.size + place, -1)

    def take(self, arrays: Sequence[jax.Array], cuts: Sequence[P | None], j: jax.Array) -> tuple[jax.Array, ...]:
        """Chunk j of every array that is cut in chunks."""
        return tuple(
            array if cut is None else self._gathered(cut, self._slice(array, j))
            for array, cut in zip(arrays, cuts, strict=True)
        )

    def add(
        self, totals: Sequence[jax.Array], rows: Sequence[jax.Array], cuts: Sequence[P | None], j: jax.Array
    ) -> tuple[jax.Array, ...]:
        """The reverse of `take`: the stored totals plus rows of chunk j, summed over the devices that share them."""

        def one(total: jax.Array, rows: jax.Array, cut: P | None) -> jax.Array:
            if cut is not None:
                stored = jax.ShapeDtypeStruct((self.span, *total.shape[1:]), rows.dtype)
                (rows,) = jax.linear_transpose(partial(self._gathered, cut), stored)(rows)
            if self.mesh is not None:
                apart = () if cut is None else (name for axis in range(len(cut)) for name in names_of(cut, axis))
                rows = jax.lax.psum(rows, tuple(set(self.mesh.axis_names).difference(apart)))
            if cut is None:
                return total + rows.astype(total.dtype)
            rows = (self._slice(total, j).astype(rows.dtype) + rows).astype(total.dtype)
            return _updated(total, rows, self.start(j))

        return tuple(one(*each) for each in zip(totals, rows, cuts, strict=True))

    def _slice(self, array: jax.Array, j: jax.Array) -> jax.Array:
        return _sliced(array, self.start(j), self.span)

    def _gathered(self, cut: P, rows: jax.Array) -> jax.Array:
        """The rows of a chunk that this device multiplies: its share, with all columns."""
        for axis in range(rows.ndim):
            if "fsdp" in names_of(cut, axis) and self.mesh.shape["fsdp"] > 1:
                rows = jax.lax.all_gather(rows, "fsdp", axis=axis, tiled=True)
        if self.sharers == 1:
            return rows
        if "tensor" in names_of(cut, 1):
            return jax.lax.all_to_all(rows, "tensor", 0, 1, tiled=True)
        return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index("tensor") * self.size, self.size)


def _sliced(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """`size` rows of x. On a CPU, 16-bit floats are sliced as integers: else XLA converts all of x to float32."""

    def as_integers(x: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(jax.lax.dynamic_slice_in_dim(_bits(x), start, size), x.dtype)

    def as_they_are(x: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size)

    return jax.lax.platform_dependent(x, start, cpu=as_integers, default=as_they_are)


def _updated(x: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    """x with `rows` in place of its own from `start` on; see `_sliced`."""

    def as_integers(x: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
        updated = jax.lax.dynamic_update_slice_in_dim(_bits(x), _bits(rows), start, 0)
        return jax.lax.bitcast_convert_type(updated, x.dtype)

    def as_they_are(x: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, rows, start, 0)

    return jax.lax.platform_dependent(x, rows, start, cpu=as_integers, default=as_they_are)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x
