"""One update as a pure function: state and batch in, new state and metrics out.

Axes: A micro-batches, B rows, T tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.data.batch import Batch
from jaxft.models.decoder import Decoder
from jaxft.models.experts import load_balancing_loss
from jaxft.models.keys import of_rows
from jaxft.models.remat import HOST
from jaxft.objectives.objective import Objective, Scores, Sum, Tally
from jaxft.objectives.token_losses import next_token_targets, token_losses
from jaxft.sharding.arrays import place
from jaxft.training.state import Partition, Trained, TrainState


class Metrics(NamedTuple):
    """The metrics of one update.

    Attributes:
        loss: the objective's mean over the `count` items that it counts, before the update.
        grad_norm: norm of the gradient of `loss`.
        tokens: tokens in the rows, without padding.
        skipped, skipped_in_a_row: updates that were not finite: in the whole run, and in a row up to this one.
        measured: the objective's other sums, each with its own count.
    """

    loss: jax.Array
    count: jax.Array
    grad_norm: jax.Array
    tokens: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    measured: dict[str, Sum]


def tally(
    model: Decoder,
    trained_type: type[nnx.Variable],
    objective: Objective,
    batch: Batch,
    key: jax.Array | None,
    router_aux_loss_coef: float = 0.0,
    packed: bool = True,
) -> Tally:
    """The objective's sums over a batch [B, T].

    With `router_aux_loss_coef`, the batch's load-balancing loss is added, weighted by the objective's count.
    `packed` goes to `Decoder.hidden_and_balance`.
    """
    hidden, balances = model.hidden_and_balance(batch.tokens, batch.positions, batch.segment_ids, key, packed)
    targets, wanted = next_token_targets(batch.tokens, batch.loss_mask, batch.segment_ids)
    losses = token_losses(*model.head_pieces(trained_type), hidden, targets, wanted)
    found = objective(Scores(losses, wanted))
    if router_aux_loss_coef:
        return found._replace(loss=found.loss + found.count * router_aux_loss_coef * load_balancing_loss(balances))
    return found


def nothing(objective: Objective) -> Tally:
    """A tally of zeros."""
    zero = jnp.float32(0)
    return Tally(zero, zero, dict.fromkeys(objective.metrics, (zero, zero)))


def make_train_step(
    partition: Partition,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    dropout_seed: int | None = None,
    router_aux_loss_coef: float = 0.0,
    packed: bool = True,
) -> Callable[[TrainState, nnx.State, Batch], tuple[TrainState, Metrics]]:
    """The jitted update. It takes over the buffers of its state argument and returns a state placed like `state`.

    The gradient is the gradient of the objective's mean over all micro-batches and devices. An update whose loss or
    gradient is not finite is counted and leaves parameters and optimizer unchanged.
    `packed`: rows may hold several examples (`Decoder.hidden_and_balance`).
    """

    def loss(trained: Trained, frozen: nnx.State, batch: Batch, key: jax.Array):
        model = partition.join(trained, frozen)
        found = tally(model, partition.trained_type, objective, batch, key, router_aux_loss_coef, packed)
        return found.loss, found

    placed = jax.tree.map(lambda array: array.sharding, state)
    in_host = any(sharding.memory_kind == HOST for sharding in jax.tree.leaves(placed.optimizer))
    at_hand = jax.tree.map(lambda sharding: sharding.with_memory_kind("device"), placed.optimizer)

    @partial(jax.jit, donate_argnums=0, out_shardings=(placed, None))
    def step(state: TrainState, frozen: nnx.State, batch: Batch) -> tuple[TrainState, Metrics]:
        def accumulate(carry, micro):
            index, batch = micro
            key = None
            if dropout_seed is not None:
                rows = index * batch.tokens.shape[0] + jnp.arange(batch.tokens.shape[0], dtype=jnp.uint32)
                key = of_rows(jax.random.fold_in(jax.random.key(dropout_seed), state.step), rows)
            (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(state.trained, frozen, batch, key)
            return jax.tree.map(jnp.add, carry, (gradient, found)), None

        zeros = jax.tree.map(jnp.zeros_like, state.trained), nothing(objective)
        indices = jnp.arange(batch.tokens.shape[0], dtype=jnp.uint32)
        (gradient, found), _ = jax.lax.scan(accumulate, zeros, (indices, batch))
        share = 1 / jnp.maximum(found.count, 1.0)
        gradient = jax.tree.map(lambda g: g * share.astype(g.dtype), gradient)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm) & jnp.isfinite(found.loss)

        with jax.numpy_dtype_promotion("standard"):  # optax mixes counts and floats
            kept = jax.device_put(state.optimizer, at_hand) if in_host else state.optimizer
            updates, optimizer_state = optimizer.update(gradient, kept, state.trained)
        updated = optax.apply_updates(state.trained, updates), optimizer_state
        trained, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), updated, (state.trained, kept)
        )
        new_state = TrainState(
            step=state.step + 1,
            trained=trained,
            optimizer=optimizer_state,
            skipped=state.skipped + jnp.where(finite, 0, 1),
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        tokens = jnp.sum(batch.segment_ids > 0, dtype=jnp.int32)
        skipped = new_state.skipped, new_state.skipped_in_a_row
        return new_state, Metrics(found.loss * share, found.count, norm, tokens, *skipped, found.metrics)

    return step


def initial_state(
    trained: Trained, optimizer: optax.GradientTransformation, mesh: Mesh | None = None, offload: bool = False
) -> TrainState:
    """The state before the first update; it takes over the trained arrays.

    Args:
        offload: keep the optimizer's state in host memory between updates.
    """
    counters = [jnp.zeros((), jnp.int32) for _ in range(3)]
    state = TrainState(counters[0], trained, optimizer.init(trained), counters[1], counters[2])
    if mesh is not None:
        whole = NamedSharding(mesh, P())
        state = jax.tree.map(lambda x: x if isinstance(x.sharding, NamedSharding) else place(x, whole), state)
    if not offload:
        return state

    def to_host(x: jax.Array) -> jax.Array:
        return jax.device_put(x, x.sharding.with_memory_kind(HOST)) if x.ndim else x

    return state._replace(optimizer=jax.tree.map(to_host, state.optimizer))


def make_eval_step(
    partition: Partition, objective: Objective, packed: bool = True
) -> Callable[[Trained, nnx.State, Batch, Tally, int], Tally]:
    """The jitted step that writes the tally of a batch [B, T] at index `number` of tallies whose arrays are [batches].

    A call waits on the devices, not on the host, for the call before it; the host reads the sums once. `packed` as in
    `make_train_step`.
    """

    @jax.jit
    def step(trained: Trained, frozen: nnx.State, batch: Batch, tallies: Tally, number: int) -> Tally:
        found = tally(partition.join(trained, frozen), partition.trained_type, objective, batch, None, packed=packed)
        return jax.tree.map(lambda all, one: all.at[number].set(one), tallies, found)

    return step
