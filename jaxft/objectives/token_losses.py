"""The negative log-probability of every target token, without ever holding the logits.

Objectives are functions of these losses (`jaxft.objectives.objective`). Their gradients reach the model through them:
the objective's gradient for a token's loss scales the gradient of that loss.

The loss treats the vocabulary as blockwise attention treats keys: it visits rows of the output head in chunks, and
keeps only a running maximum and a running sum for each token. If the head is frozen, the gradient of a hidden state is
a running sum too, of the head's rows weighted by the softmax. So one pass with two products gives loss and gradient. If
the head is trained, the forward pass saves two numbers for each token, and the backward pass visits the chunks again.

The target is kept apart from the other tokens. Let `gap` be the log-sum-exp of all other logits minus the target's
logit. Then the loss is softplus(gap), and sigmoid(gap) is 1 minus the target's probability. Neither is a difference of
close numbers, so the gradient of a token that is already learned has a small relative error, in bfloat16 too.

Axes: B batch, T tokens, D hidden, V vocabulary; k chunks of C tokens; R rows in a chunk of the vocabulary.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxft.models.head import Arrays, Chunks, Head
from jaxft.sharding.mesh import BATCH_AXES, batch_ways

CHUNK_TOKENS = 4096
CHUNK_ROWS = 4096
"""Tokens, and rows of the head, multiplied at a time: at most 16M logits, 64 MB. Each row that is read meets thousands
of tokens and each token thousands of rows, so that products are bound by arithmetic, not by memory, on any chip."""

LOWEST = -1e30
"""Below every logit, but finite: the maximum of no logits."""

_BY_TOKEN = P(BATCH_AXES, "context")


def next_token_targets(tokens: jax.Array, loss_mask: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Targets [B, T] int32, and where they are wanted [B, T] bool: position t predicts token t + 1.

    A token is supervised when its `loss_mask` says so and its predecessor is in the same segment.
    """
    targets = jnp.roll(tokens, -1, axis=1)
    wanted = jnp.roll(loss_mask, -1, axis=1) & (jnp.roll(segments, -1, axis=1) == segments) & (segments > 0)
    return targets, wanted.at[:, -1].set(False)


def token_losses(
    head: Head, trained: Arrays, frozen: Arrays, hidden: jax.Array, targets: jax.Array, wanted: jax.Array
) -> jax.Array:
    """Negative log-probability of each target: [B, T] float32, 0 where it is not wanted.

    Args:
        head: how to compute logits from the arrays.
        trained: the head's arrays that have gradients; may be empty.
        frozen: the head's arrays that have none.
        hidden: [B, T, D].
        targets: [B, T] int32; any number where it is not wanted.
        wanted: [B, T] bool.
    """
    if head.mesh is None:
        return _losses(head, trained, frozen, hidden, targets, wanted)
    ways = batch_ways(head.mesh), head.mesh.shape["context"]  # every device gets as many tokens
    rows, length = targets.shape
    padding = [(0, -size % count) for size, count in zip(targets.shape, ways, strict=True)]
    hidden = jnp.pad(hidden, [*padding, (0, 0)])
    losses = _losses(head, trained, frozen, hidden, jnp.pad(targets, padding), jnp.pad(wanted, padding))
    return losses[:rows, :length]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(head, trained, frozen, hidden, targets, wanted):
    return _on_devices(_loss, head, _BY_TOKEN, trained, frozen, hidden, targets, wanted)[0]


def _losses_forward(head, trained, frozen, hidden, targets, wanted):
    arrays = trained, frozen, hidden, targets, wanted
    losses, saved = _on_devices(_loss if trained else _loss_and_gradient, head, _BY_TOKEN, *arrays)
    return losses, (*arrays, *saved) if trained else saved


def _losses_backward(head, residuals, d_losses):
    if not head.trained:
        d_hidden = residuals.astype(d_losses.dtype) * d_losses[..., None]
        return (), None, d_hidden.astype(residuals.dtype), None, None
    trained, frozen, hidden, targets, wanted, log_sum, gap = residuals
    arrays = trained, frozen, hidden, targets, jnp.where(wanted, d_losses, 0.0), log_sum, gap
    d_trained, d_hidden = _on_devices(_gradients, head, (_specs(head.trained), _BY_TOKEN), *arrays)
    return d_trained, None, d_hidden, None, None


_losses.defvjp(_losses_forward, _losses_backward)


def _on_devices(function, head: Head, out_specs, trained: Arrays, frozen: Arrays, *by_token: jax.Array):
    """function(head, trained, frozen, *by_token) on each device's shards of the arrays."""
    if head.mesh is None:
        return function(head, trained, frozen, *by_token)
    specs = _specs(head.trained), _specs(head.frozen), *(_BY_TOKEN for _ in by_token)
    run = jax.shard_map(partial(function, head), mesh=head.mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
    return run(trained, frozen, *by_token)


def _specs(cuts: tuple[P | None, ...]) -> tuple[P, ...]:
    return tuple(P() if cut is None else cut for cut in cuts)


class Seen(NamedTuple):
    """The state of each token after some chunks of the vocabulary; the first three fields leave out its target."""

    highest: jax.Array  # [k, C] largest logit
    total: jax.Array  # [k, C] sum of exp(logit - highest)
    pulled: jax.Array | None  # [k, C, D] sum of the logits' gradients, with these weights; None if not wanted
    target: jax.Array  # [k, C] logit of the target
    target_rows: tuple[jax.Array | None, ...]  # [k, C, ...] the head's rows for the target, if `pulled` is wanted


def _loss(head, trained, frozen, hidden, targets, wanted):
    """For each token [B, T]: its loss; then its log-sum-exp and gap."""
    seen = _visit(head, trained, frozen, _cut(hidden), _cut(targets), wants_gradient=False)
    gap = _joined(seen.highest + jnp.log(seen.total) - seen.target, targets)
    loss = jax.nn.softplus(gap)
    return jnp.where(wanted, loss, 0.0), (_joined(seen.target, targets) + loss, gap)


def _loss_and_gradient(head, trained, frozen, hidden, targets, wanted):
    """For each token: its loss [B, T], and the loss's gradient [B, T, D] with respect to the token's hidden state."""
    h = _cut(hidden)
    seen = _visit(head, trained, frozen, h, _cut(targets), wants_gradient=True)
    gap = seen.highest + jnp.log(seen.total) - seen.target

    def target_logit(rows, h):
        arrays = (whole if row is None else row[None] for row, whole in zip(rows, frozen, strict=True))
        return head.logits((), tuple(arrays), h[None])[0, 0]

    def gradient(chunk):
        h, seen, gap, wanted = chunk
        away = seen.pulled / seen.total[:, None]
        towards = jax.vmap(jax.grad(target_logit, 1))(seen.target_rows, h.astype(jnp.float32))
        # A target that is not wanted may be no valid token, so its gradient has no meaning.
        return jnp.where(wanted[:, None], jax.nn.sigmoid(gap)[:, None] * (away - towards), 0.0).astype(h.dtype)

    d_hidden = jax.lax.map(gradient, (h, seen, gap, _cut(wanted)))
    losses = jnp.where(wanted, jax.nn.softplus(_joined(gap, targets)), 0.0)
    return losses, _joined(d_hidden, hidden)


def _visit(head: Head, trained: Arrays, frozen: Arrays, h: jax.Array, targets: jax.Array, wants_gradient: bool) -> Seen:
    """Visit the whole vocabulary, for tokens h [k, C, D] with targets [k, C]."""
    chunks, cuts = Chunks.of(head, (*trained, *frozen), CHUNK_ROWS), head.trained + head.frozen

    def one_chunk_of_rows(seen, j):
        arrays = chunks.take((*trained, *frozen), cuts, j)
        fresh = chunks.fresh(j)

        def one_chunk_of_tokens(_, chunk):
            h, target, seen = chunk
            logits, pull = jax.vjp(lambda h: head.logits(arrays[: len(trained)], arrays[len(trained) :], h), h)
            at = chunks.position(j, target)
            others = jnp.where(fresh & (jnp.arange(fresh.size) != at[:, None]), logits, -jnp.inf)
            highest = jnp.maximum(seen.highest, others.max(axis=1))
            weights, shrink = jnp.exp(others - highest[:, None]), jnp.exp(seen.highest - highest)
            total = seen.total * shrink + weights.sum(axis=1)
            found = jnp.take_along_axis(logits, jnp.maximum(at, 0)[:, None], axis=1)[:, 0]
            new = seen._replace(highest=highest, total=total, target=jnp.where(at < 0, seen.target, found))
            if not wants_gradient:
                return None, new
            pulled = seen.pulled * shrink[:, None] + pull(weights)[0].astype(jnp.float32)
            return None, new._replace(pulled=pulled, target_rows=_picked(seen.target_rows, arrays, at))

        return jax.lax.scan(one_chunk_of_tokens, None, (h, targets, seen))[1], None

    nothing = jnp.zeros(targets.shape)
    start = Seen(jnp.full(targets.shape, LOWEST), nothing, None, nothing, ())
    if wants_gradient:
        shapes = jax.eval_shape(lambda: chunks.take((*trained, *frozen), cuts, jnp.int32(0)))
        rows = (
            None if cut is None else jnp.zeros((*targets.shape, *chunk.shape[1:]), chunk.dtype)
            for chunk, cut in zip(shapes, cuts, strict=True)
        )
        start = start._replace(pulled=jnp.zeros(h.shape), target_rows=tuple(rows))
    seen, _ = jax.lax.scan(one_chunk_of_rows, start, jnp.arange(chunks.count))
    return seen if head.mesh is None else _over_tensor(seen)


def _picked(targets: tuple, rows: Arrays, at: jax.Array) -> tuple[jax.Array | None, ...]:
    """The head's rows for the targets, with those that this chunk holds filled in."""

    def pick(target: jax.Array, rows: jax.Array) -> jax.Array:
        here = (at >= 0).reshape(-1, *(1,) * (rows.ndim - 1))
        return jnp.where(here, rows[jnp.maximum(at, 0)], target)

    return tuple(None if target is None else pick(target, one) for target, one in zip(targets, rows, strict=True))


def _over_tensor(seen: Seen) -> Seen:
    """Combine the states of the devices along tensor, each from its own rows."""
    highest = jax.lax.pmax(seen.highest, "tensor")
    shrink = jnp.exp(seen.highest - highest)
    pulled = None if seen.pulled is None else seen.pulled * shrink[..., None]
    return Seen(highest, *jax.lax.psum((seen.total * shrink, pulled, seen.target, seen.target_rows), "tensor"))


def _gradients(head, trained, frozen, hidden, targets, weights, log_sum, gap):
    """Gradients of the trained arrays and of the hidden states [B, T, D]; the logits are computed again."""
    chunks = Chunks.of(head, (*trained, *frozen), CHUNK_ROWS)
    h, *by_token = (_cut(each) for each in (hidden, targets, weights, log_sum, gap))

    def one_chunk_of_rows(carry, j):
        d_trained, d_h = carry
        rows, constant = chunks.take(trained, head.trained, j), chunks.take(frozen, head.frozen, j)
        fresh = chunks.fresh(j)

        def one_chunk_of_tokens(d_rows, chunk):
            h, target, weight, log_sum, gap, d_h = chunk
            logits, pull = jax.vjp(lambda rows, h: head.logits(rows, constant, h), rows, h)
            probability = jnp.where(fresh, jnp.exp(logits - log_sum[:, None]), 0.0)
            is_target = jnp.arange(fresh.size) == chunks.position(j, target)[:, None]
            d_logits = jnp.where(is_target, -jax.nn.sigmoid(gap)[:, None], probability) * weight[:, None]
            more_rows, more_h = pull(d_logits)
            d_rows = tuple(d + more.astype(d.dtype) for d, more in zip(d_rows, more_rows, strict=True))
            return d_rows, d_h + more_h.astype(d_h.dtype)

        zeros = tuple(jnp.zeros(array.shape) for array in rows)
        d_rows, d_h = jax.lax.scan(one_chunk_of_tokens, zeros, (h, *by_token, d_h))
        return (chunks.add(d_trained, d_rows, head.trained, j), d_h), None

    start = tuple(jnp.zeros_like(array) for array in trained), jnp.zeros(h.shape)
    (d_trained, d_h), _ = jax.lax.scan(one_chunk_of_rows, start, jnp.arange(chunks.count))
    d_h = d_h if head.mesh is None else jax.lax.psum(d_h, "tensor")
    return d_trained, _joined(d_h, hidden).astype(hidden.dtype)


def _cut(x: jax.Array) -> jax.Array:
    """[B, T, ...] in equal chunks of tokens, the last padded with zeros: [k, C, ...]."""
    x = x.reshape(-1, *x.shape[2:])
    count = -(-len(x) // CHUNK_TOKENS)
    size = -(-len(x) // count)
    return jnp.pad(x, [(0, count * size - len(x))] + [(0, 0)] * (x.ndim - 1)).reshape(count, size, *x.shape[1:])


def _joined(x: jax.Array, like: jax.Array) -> jax.Array:
    """The reverse of `_cut`."""
    return x.reshape(-1, *x.shape[2:])[: like.shape[0] * like.shape[1]].reshape(like.shape)
