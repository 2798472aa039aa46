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

from jaxft.data.loader import Batch
from jaxft.models.decoder import Decoder, project
from jaxft.models.experts import load_balancing_loss
from jaxft.objectives.cross_entropy import cross_entropy, next_token_targets
from jaxft.sharding.arrays import place
from jaxft.training.state import Partition, Trained, TrainState


class Metrics(NamedTuple):
    """What an update reports; `loss` is the mean over `supervised` tokens, before the update."""

    loss: jax.Array
    grad_norm: jax.Array
    supervised: jax.Array
    tokens: jax.Array
    finite: jax.Array


def loss_sum(
    model: Decoder,
    trained_type: type[nnx.Variable],
    batch: Batch,
    key: jax.Array | None,
    router_aux_loss_coef: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Summed loss of a batch [B, T] and the number of tokens it was summed over.

    The loss of a token is its cross-entropy and, times the coefficient, the load-balancing loss of the batch.
    """
    hidden, balances = model.hidden_and_balance(batch.tokens, batch.positions, batch.segment_ids, key)
    targets, weights = next_token_targets(batch.tokens, batch.loss_mask, batch.segment_ids)
    graph, trained, frozen = nnx.split(model.head, trained_type, ...)

    def unembed(trained, frozen, h):
        return project(model.config, nnx.merge(graph, trained, frozen), h)

    total = cross_entropy(unembed, trained, frozen, hidden, targets, weights, model.config.vocab_size)
    count = weights.sum()
    if router_aux_loss_coef:
        total = total + count * router_aux_loss_coef * load_balancing_loss(balances)
    return total, count


def make_train_step(
    partition: Partition,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    dropout_seed: int | None = None,
    router_aux_loss_coef: float = 0.0,
) -> Callable[[TrainState, nnx.State, Batch], tuple[TrainState, Metrics]]:
    """The jitted update; it takes over the buffers of the state given, and returns one placed like `state`.

    The gradient is that of the mean over all supervised tokens of all micro-batches and devices. An update
    whose loss or gradient is not finite leaves parameters and optimizer as they were and is counted.
    """

    def loss(trained: Trained, frozen: nnx.State, batch: Batch, key: jax.Array):
        model = partition.join(trained, frozen)
        return loss_sum(model, partition.trained_type, batch, key, router_aux_loss_coef)

    placed = jax.tree.map(lambda array: array.sharding, state)

    @partial(jax.jit, donate_argnums=0, out_shardings=(placed, None))
    def step(state: TrainState, frozen: nnx.State, batch: Batch) -> tuple[TrainState, Metrics]:
        def accumulate(carry, micro):
            index, batch = micro
            key = None
            if dropout_seed is not None:
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(dropout_seed), state.step), index)
            (total, count), gradient = jax.value_and_grad(loss, has_aux=True)(state.trained, frozen, batch, key)
            return jax.tree.map(jnp.add, carry, (gradient, total, count)), None

        zeros = jax.tree.map(jnp.zeros_like, state.trained), jnp.float32(0), jnp.float32(0)
        indices = jnp.arange(batch.tokens.shape[0], dtype=jnp.uint32)
        (gradient, total, count), _ = jax.lax.scan(accumulate, zeros, (indices, batch))
        share = 1 / jnp.maximum(count, 1.0)
        gradient = jax.tree.map(lambda g: g * share.astype(g.dtype), gradient)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm) & jnp.isfinite(total)

        with jax.numpy_dtype_promotion("standard"):  # optax mixes counts and floats
            updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trained)
        updated = optax.apply_updates(state.trained, updates), optimizer_state
        trained, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), updated, (state.trained, state.optimizer)
        )
        new_state = TrainState(
            step=state.step + 1,
            trained=trained,
            optimizer=optimizer_state,
            skipped=state.skipped + jnp.where(finite, 0, 1),
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        tokens = jnp.sum(batch.segment_ids > 0, dtype=jnp.int32)
        return new_state, Metrics(total * share, norm, count.astype(jnp.int32), tokens, finite)

    return step


def initial_state(trained: Trained, optimizer: optax.GradientTransformation, mesh: Mesh | None = None) -> TrainState:
    """The state before the first update; it takes over the trained arrays."""
    counters = [jnp.zeros((), jnp.int32) for _ in range(3)]
    state = TrainState(counters[0], trained, optimizer.init(trained), counters[1], counters[2])
    if mesh is None:
        return state
    replicated = NamedSharding(mesh, P())
    return jax.tree.map(lambda x: x if isinstance(x.sharding, NamedSharding) else place(x, replicated), state)


def make_eval_step(
    partition: Partition,
) -> Callable[[Trained, nnx.State, Batch], tuple[jax.Array, jax.Array]]:
    """Jitted (loss sum, count) of a batch [B, T]."""

    @jax.jit
    def step(trained: Trained, frozen: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return loss_sum(partition.join(trained, frozen), partition.trained_type, batch, None)

    return step
