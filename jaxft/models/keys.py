"""Random keys for dropout: one for all rows of a batch, or one for each row, [B].

With one key for each row, a row's dropout does not depend on the other rows. So an update drops the same values however
its rows are cut into micro-batches and over devices.
"""

from functools import partial

import jax


def split(key: jax.Array, count: int = 2) -> jax.Array:
    """`count` new keys from each key: [count] or [count, B]."""
    return jax.vmap(partial(split, count=count), out_axes=1)(key) if key.ndim else jax.random.split(key, count)


def fold_in(key: jax.Array, number: int) -> jax.Array:
    """A new key from each key and the number."""
    return jax.vmap(fold_in, in_axes=(0, None))(key, number) if key.ndim else jax.random.fold_in(key, number)


def of_rows(key: jax.Array, rows: jax.Array) -> jax.Array:
    """One key for each row, from the row numbers [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)
