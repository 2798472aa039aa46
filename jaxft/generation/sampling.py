"""How the next token is chosen: the most likely one, or one drawn from the softmax.

Every row draws from its own random stream, made from the seed, the row's prompt and how many rows before it
have the same prompt. So a row's text does not depend on the other rows of the batch, and copies of a prompt
get different texts.

Axes: B rows, V vocabulary.
"""

import zlib
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Sampling(NamedTuple):
    """How tokens are drawn."""

    keys: jax.Array  # [B], one random stream for each row
    temperature: jax.Array  # float32 scalar, above 0; divides the logits before the nucleus is cut
    top_p: jax.Array | None  # float32 scalar; None: all tokens can be drawn


def row_keys(seed: int, prompts: Sequence[np.ndarray]) -> jax.Array:
    """The keys of the rows' random streams, [B], for int32 prompts."""
    digests, copies, seen = [], [], Counter()
    for prompt in prompts:
        digest = zlib.crc32(prompt.tobytes())
        digests.append(digest)
        copies.append(seen[digest])
        seen[digest] += 1
    return _streams(jax.random.key(seed), np.array(digests, np.uint32), np.array(copies, np.uint32))


@jax.jit
def _streams(key: jax.Array, digests: jax.Array, copies: jax.Array) -> jax.Array:
    return jax.vmap(lambda *numbers: reduce(jax.random.fold_in, numbers, key))(digests, copies)


def choose(logits: jax.Array, step: jax.Array, sampling: Sampling | None) -> jax.Array:
    """The next token of each row, [B] int32, from logits [B, V] float32.

    Args:
        step: how many tokens were chosen before, int32.
        sampling: None takes the most likely token, the lowest id among equals.
    """
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # With 0 as the maximum, no temperature can make the logits overflow.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_p is not None:
        logits = jnp.where(nucleus(logits, sampling.top_p), logits, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in, (0, None))(sampling.keys, step)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """The smallest set of tokens that has probability top_p or more, as bool [B, V] (arXiv 1904.09751).

    The most likely token always belongs to it. Among equals the lower ids are taken first.
    """
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    probabilities = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    kept = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
    return jnp.put_along_axis(jnp.zeros_like(kept), order, kept, axis=-1, inplace=False)
