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
from jaxft.models.decoder import Decoder, project
from jaxft.models.experts import load_balancing_loss
from jaxft.models.keys import of_rows
from jaxft.models.remat import HOST
from jaxft.objectives.cross_entropy import cross_entropy, next_token_targets
from jaxft.objectives.head import Head
from jaxft.sharding.arrays import place
from jaxft.training.state import Partition, Trained, TrainState


class Metrics(NamedTuple):
    """What an update reports; `loss` is the mean over `supervised` tokens, before the update. `skipped` updates of the
    run, and `skipped_in_a_row` to the last, were not finite."""

    loss: jax.Array
    grad_norm: jax.Array
    supervised: jax.Array
    tokens: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def loss_sum(
    model: Decoder,
    trained_type: type[nnx.Variable],
    batch: Batch,
    key: jax.Array | None,
    router_aux_loss_coef: float = 0.0,
    packed: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Summed loss of a batch [B, T] and the number of tokens it was summed over.

    The loss of a token is its cross-entropy and, times the coefficient, the load-balancing loss of the batch.
    `packed` is that of `Decoder.hidden_and_balance`.
    """
    hidden, balances = model.hidden_and_balance(batch.tokens, batch.positions, batch.segment_ids, key, packed)
    targets, weights = next_token_targets(batch.tokens, batch.loss_mask, batch.segment_ids)
    total = cross_entropy(*head_parts(model, trained_type), hidden, targets, weights)
    count = weights.sum()
    if router_aux_loss_coef:
        total = total + count * router_aux_loss_coef * load_balancing_loss(balances)
    return total, count


def head_parts(
    model: Decoder, trained_type: type[nnx.Variable]
) -> tuple[Head, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """The output head as the loss wants it, its trained arrays and its frozen ones."""
    head, layout = nnx.clone(model.head), model.head.layout
    head.layout = None  # the loss gathers rows itself
    adapter = getattr(head, "adapter", None)
    if adapter is not None:
        adapter.layout_A = adapter.layout_B = None
    graph, *states = nnx.split(head, trained_type, ...)
    flat = [jax.tree_util.tree_flatten_with_path(state) for state in states]

    def cut(path: tuple) -> P | None:
        match [key.key for key in path if isinstance(key, jax.tree_util.DictKey)][-1]:
            case "A" | "scale":
                return None
            case "weight" if layout is not None:
                return layout.stored
            case _:
                return P(None if layout is None else layout.stored[0])

    def logits(trained, frozen, h):
        parts = (jax.tree.unflatten(tree, leaves) for (_, tree), leaves in zip(flat, (trained, frozen), strict=True))
        return project(model.config, nnx.merge(graph, *parts), h)

    cuts = (tuple(cut(path) for path, _ in leaves) for leaves, _ in flat)
    arrays = (tuple(leaf for _, leaf in leaves) for leaves, _ in flat)
    return Head(logits, *cuts, None if layout is None else layout.mesh), *arrays


def make_train_step(
    partition: Partition,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    dropout_seed: int | None = None,
    router_aux_loss_coef: float = 0.0,
    packed: bool = True,
) -> Callable[[TrainState, nnx.State, Batch], tuple[TrainState, Metrics]]:
    """The jitted update; it takes over the buffers of the state given, and returns one placed like `state`.

    The gradient is that of the mean over all supervised tokens of all micro-batches and devices. An update
    whose loss or gradient is not finite leaves parameters and optimizer as they were and is counted.
    `packed`: rows may hold several examples (`Decoder.hidden_and_balance`).
    """

    def loss(trained: Trained, frozen: nnx.State, batch: Batch, key: jax.Array):
        model = partition.join(trained, frozen)
        return loss_sum(model, partition.trained_type, batch, key, router_aux_loss_coef, packed)

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
        supervised, skipped = count.astype(jnp.int32), (new_state.skipped, new_state.skipped_in_a_row)
        return new_state, Metrics(total * share, norm, supervised, tokens, *skipped)

    return step


def initial_state(
    trained: Trained, optimizer: optax.GradientTransformation, mesh: Mesh | None = None, offload: bool = False
) -> TrainState:
    """The state before the first update; it takes over the trained arrays.

    Args:
        offload: between updates the optimizer's state is in the memory of the host.
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
    partition: Partition, packed: bool = True
) -> Callable[[Trained, nnx.State, Batch, jax.Array, int], jax.Array]:
    """Jitted: sums [batches, 2] with (loss sum, count) of a batch [B, T] in row `number`; `packed` as in
    `make_train_step`.

    Each call waits for the one before it on the devices and not on the host, which reads the sums once.
    """

    @jax.jit
    def step(trained: Trained, frozen: nnx.State, batch: Batch, sums: jax.Array, number: int) -> jax.Array:
        model = partition.join(trained, frozen)
        return sums.at[number].set(jnp.stack(loss_sum(model, partition.trained_type, batch, None, packed=packed)))

    return step
