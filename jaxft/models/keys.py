"""Keys of dropout: one for all rows of a batch, or one for each, [B].

With one for each, what is dropped of a row does not depend on the rows beside it. So an update drops the same however
its rows are cut into micro-batches and over devices.
"""

from functools import partial

import jax


def split(key: jax.Array, count: int = 2) -> jax.Array:
    """`count` new keys from each: [count] or [count, B]."""
    return jax.vmap(partial(split, count=count), out_axes=1)(key) if key.ndim else jax.random.split(key, count)


def fold_in(key: jax.Array, number: int) -> jax.Array:
    """A new key from each and the number."""
    return jax.vmap(fold_in, in_axes=(0, None))(key, number) if key.ndim else jax.random.fold_in(key, number)


def of_rows(key: jax.Array, rows: jax.Array) -> jax.Array:
    """One key for each row [B] of those numbers."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)
