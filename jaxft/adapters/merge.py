"""Fold adapters into the weights they sit on, in float32 (the last step before a model is shipped).

Layers, and experts, are folded one after the other, so that a whole stack is never held in float32.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.adapters.attach import detach, sites
from jaxft.adapters.lora import LoRA
from jaxft.models.decoder import Decoder
from jaxft.quantization.qtensor import QTensor


def merge(model: Decoder, *, donate: bool = False) -> Decoder:
    """The model with W + s B A in place of W (DoRA: rows rescaled to their magnitude), and no adapter.

    Args:
        model: does not change, so every adapted weight is in memory twice.
        donate: consume the adapted weights of `model`, and make the new weights in their memory.

    Raises:
        ValueError: there is no adapter, or the base is quantized. Adding an adapter to rounded weights and rounding
            the sum again costs quality; load the original weights instead.
    """
    merged = detach(model)
    found = False
    for before, after in zip(sites(model), sites(merged), strict=True):
        adapter = before.linear.adapter
        if adapter is None:
            continue
        found = True
        weight = before.linear.weight.get_value()
        if isinstance(weight, QTensor):
            raise ValueError(
                f"{before.modules[0]} is quantized; an adapter is merged into the original weights: "
                "load the base without quantization, load the adapter on it, and merge that"
            )
        after.linear.weight = nnx.Param(_fold(weight if donate else weight.copy(), adapter))
    if not found:
        raise ValueError("the model carries no adapter to merge")
    return merged


def _fold(weight: jax.Array, adapter: LoRA) -> jax.Array:
    """The folded weight, in the memory of the given weight."""
    if weight.ndim == 2:
        return _fold_one(weight, adapter)
    for index in np.ndindex(weight.shape[:-2]):
        position = tuple(map(jnp.int32, index))
        weight = _put(weight, _fold_one(*_pick((weight, adapter), position)), position)
    return weight


@jax.jit
def _pick(stacks: tuple[jax.Array, LoRA], position: tuple[jax.Array, ...]) -> tuple[jax.Array, LoRA]:
    return jax.tree.map(lambda stack: stack[position], stacks)


@partial(jax.jit, donate_argnums=0)
def _put(stack: jax.Array, new: jax.Array, position: tuple[jax.Array, ...]) -> jax.Array:
    start = (*position, jnp.int32(0), jnp.int32(0))
    return jax.lax.dynamic_update_slice(stack, new.reshape((1,) * len(position) + new.shape), start)


@partial(jax.jit, donate_argnums=0)
def _fold_one(weight: jax.Array, adapter: LoRA) -> jax.Array:
    scale = adapter.scale[...]
    total = weight.astype(jnp.float32) + scale * jnp.matmul(adapter.B[...], adapter.A[...], precision="highest")
    if adapter.magnitude is not None:
        gain = adapter.magnitude[...] / jnp.sqrt(jnp.sum(total * total, axis=-1))
        total = total * jnp.where(scale == 0, 1.0, gain)[:, None]
    return total.astype(weight.dtype)
