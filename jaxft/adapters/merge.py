"""Fold adapters into the weights they sit on, in float32 (the last step before a model is shipped)."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.adapters.attach import detach, sites
from jaxft.adapters.lora import LoRA
from jaxft.models.decoder import Decoder
from jaxft.quantization.qtensor import QTensor


def merge(model: Decoder) -> Decoder:
    """The model with W + s B A in place of W (DoRA: rows rescaled to their magnitude), and no adapter.

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
        after.linear.weight = nnx.Param(_folded(weight, adapter))
    if not found:
        raise ValueError("the model carries no adapter to merge")
    return merged


@jax.jit
def _folded(weight: jax.Array, adapter: LoRA) -> jax.Array:
    total = weight.astype(jnp.float32) + adapter.scale[...][..., None, None] * jnp.einsum(
        "...or,...ri->...oi", adapter.B[...], adapter.A[...], precision="highest"
    )
    if adapter.magnitude is not None:
        gain = adapter.magnitude[...] / jnp.sqrt(jnp.sum(total * total, axis=-1))
        absent = adapter.scale[...][..., None] == 0
        total = total * jnp.where(absent, 1.0, gain)[..., None]
    return total.astype(weight.dtype)
