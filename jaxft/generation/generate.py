"""Text generation in batches, with a key-value cache.

Prompts of different lengths are padded on the left, so that all rows write their next token into the same
slot: one call fills the cache with the prompts, then a loop on the device adds a token to every row until all
have ended. Prompt and cache lengths are rounded up to multiples of `BUCKET`, so few shapes are ever compiled.

Axes: B rows, P prompt slots, S cache slots, V vocabulary.
"""

import logging
from collections.abc import Collection, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.generation.sampling import Sampling, choose, row_keys
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Cache, Decoder
from jaxft.models.ulysses import HEADS
from jaxft.sharding.arrays import place
from jaxft.sharding.layout import ways
from jaxft.sharding.mesh import BATCH_AXES, batch_ways, row_sharding

logger = logging.getLogger(__name__)

BUCKET = 64


class _Rows(NamedTuple):
    """A padded batch of prompts."""

    tokens: jax.Array  # [B, P] int32
    segments: jax.Array  # [B, P] int32
    lengths: jax.Array  # [B] int32, of the prompts
    limits: jax.Array  # [B] int32, the most tokens to add


class _Progress(NamedTuple):
    """The state of the loop."""

    cache: Cache
    chosen: jax.Array  # [B, S] int32, new tokens
    step: jax.Array  # int32, how many tokens were chosen for every row
    count: jax.Array  # [B] int32, how many of them are the row's text
    alive: jax.Array  # [B] bool: the text goes on
    broken: jax.Array  # [B] bool: it ended in logits that are not finite


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """The tokens that the model writes after each prompt, up to the first of `eos_ids`, which is left out.

    A text ends at the model's last position at the latest, with a warning. With the rope type `dynamic` there is no
    last position.

    Args:
        prompts: token ids, special tokens included.
        max_new_tokens: the most that is written after a prompt.
        eos_ids: tokens that end a text; may be empty.
        temperature: 0 takes the most likely token; above 0, draws come from softmax(logits / temperature).
        top_p: draw from the most likely tokens that together have this probability; 1 = from all.
        seed: of the draws. The same seed and prompt give the same text in any batch (see `sampling`).

    Raises:
        ValueError: an argument out of its range; a prompt that is empty, fills all positions or holds unknown
            ids; logits that are not finite.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be 0 (no draws) or a positive number")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if len(prompts) == 0:
        return []
    ids = [_checked(model.config, f"prompts[{row}]", prompt) for row, prompt in enumerate(prompts)]
    limits = [min(max_new_tokens, _room(model.config, len(prompt))) for prompt in ids]
    mesh = None if model.activations is None else model.activations.mesh
    rows = _pad(ids, limits, mesh)
    sampling = None
    if temperature > 0:
        keys = row_keys(seed, ids + ids[:1] * (len(rows.tokens) - len(ids)))
        sampling = Sampling(keys, jnp.float32(temperature), None if top_p == 1 else jnp.float32(top_p))

    stops = np.array(sorted(eos_ids), np.int32)
    end = _complete(model, rows, stops, sampling, slots=_rounded(rows.tokens.shape[1] + max(limits) - 1))
    chosen, count, broken = (np.asarray(array)[: len(ids)] for array in end)
    if broken.any():
        row = broken.argmax()
        raise ValueError(
            f"prompts[{row}]: the model's logits are not finite after {count[row]} new tokens; "
            "look for NaN or inf in its weights and its adapter"
        )
    if full := [row for row in range(len(ids)) if count[row] == limits[row] < max_new_tokens]:
        logger.warning(
            "prompts %s: the text ends before max_new_tokens (%d), where the model's %d positions are full",
            full,
            max_new_tokens,
            model.config.rope.max_positions,
        )
    return [new[:n].tolist() for new, n in zip(chosen, count, strict=True)]


def _checked(config: DecoderConfig, name: str, prompt: Sequence[int]) -> np.ndarray:
    ids = np.asarray(prompt)
    if ids.ndim != 1 or ids.size == 0:
        raise ValueError(f"{name} holds no token ids; a prompt has at least one, such as BOS")
    if not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(
            f"{name} holds ids outside the model's vocabulary, 0 to {config.vocab_size - 1}; "
            "is the tokenizer that of the model?"
        )
    if _room(config, ids.size) < 1:
        raise ValueError(
            f"{name} has {ids.size} tokens and the model {config.rope.max_positions} positions, "
            "which leaves no room to go on; shorten it"
        )
    return ids.astype(np.int32)


def _room(config: DecoderConfig, length: int) -> int:
    """How many positions are left after a prompt."""
    return np.iinfo(np.int32).max if config.rope.type == "dynamic" else config.rope.max_positions - length


def _rounded(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


def _pad(prompts: Sequence[np.ndarray], limits: Sequence[int], mesh: Mesh | None) -> _Rows:
    """Prompts padded on the left and, on a mesh, with idle rows that have nothing to add."""
    idle = 0 if mesh is None else -len(prompts) % batch_ways(mesh)
    prompts, limits = [*prompts, *[prompts[0]] * idle], [*limits, *[0] * idle]
    lengths = [len(prompt) for prompt in prompts]
    tokens, segments = np.zeros((2, len(prompts), _rounded(max(lengths))), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, -len(prompt) :] = prompt
        segments[row, -len(prompt) :] = 1
    rows = _Rows(tokens, segments, np.array(lengths, np.int32), np.array(limits, np.int32))
    return rows if mesh is None else jax.tree.map(partial(place, sharding=row_sharding(mesh)), rows)


@partial(jax.jit, static_argnames="slots")
def _complete(
    model: Decoder, rows: _Rows, stops: jax.Array, sampling: Sampling | None, slots: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """New tokens [B, S], how many of them are each row's text [B], and which rows ended in bad logits [B].

    `stops` are the ids that end a text, `slots` is the length of the cache.
    """
    batch, width = rows.tokens.shape

    def choose_next(progress: _Progress, logits: jax.Array) -> _Progress:
        token = choose(logits, progress.step, sampling)
        finite = jnp.isfinite(logits).all(axis=-1)
        is_text = progress.alive & finite & (token[:, None] != stops).all(axis=-1)
        count = progress.count + is_text.astype(jnp.int32)
        return _Progress(
            cache=progress.cache,
            chosen=progress.chosen.at[:, progress.step].set(token),
            step=progress.step + 1,
            count=count,
            alive=is_text & (count < rows.limits),
            broken=progress.broken | (progress.alive & ~finite),
        )

    def add_token(progress: _Progress) -> _Progress:
        last = progress.step - 1
        token = jax.lax.dynamic_slice_in_dim(progress.chosen, last, 1, axis=1)
        position = (rows.lengths + last)[:, None]
        h, cache = model.extend(progress.cache, token, position, jnp.ones_like(token))
        return choose_next(progress._replace(cache=cache), model.unembed(h[:, 0]))

    positions = jnp.arange(width, dtype=jnp.int32) - (width - rows.lengths[:, None])
    cache = _sharded(model, model.empty_cache(batch, slots))
    h, cache = model.extend(cache, rows.tokens, jnp.maximum(positions, 0), rows.segments)
    start = _Progress(
        cache=cache,
        chosen=jnp.zeros((batch, slots), jnp.int32),
        step=jnp.int32(0),
        count=jnp.zeros(batch, jnp.int32),
        alive=rows.limits > 0,
        broken=jnp.zeros(batch, bool),
    )
    first = choose_next(start, model.unembed(h[:, -1]))
    end = jax.lax.while_loop(lambda progress: progress.alive.any(), add_token, first)
    result = end.chosen, end.count, end.broken
    if model.activations is None:
        return result
    # Whole on every device, so that every host can read it.
    return jax.lax.with_sharding_constraint(result, NamedSharding(model.activations.mesh, P()))


def _sharded(model: Decoder, cache: Cache) -> Cache:
    """The cache, cut over the model's mesh by rows, and by heads if they divide evenly."""
    if model.activations is None:
        return cache
    mesh = model.activations.mesh
    cuts = (HEADS, "tensor", None)
    heads = next(cut for cut in cuts if model.config.num_kv_heads % ways(mesh, cut) == 0)
    by_head = NamedSharding(mesh, P(None, BATCH_AXES, None, heads))
    return cache._replace(
        layers=jax.lax.with_sharding_constraint(cache.layers, by_head),
        segments=jax.lax.with_sharding_constraint(cache.segments, row_sharding(mesh)),
    )
