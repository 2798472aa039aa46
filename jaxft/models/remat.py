"""What the backward pass computes again instead of keeping it (rematerialisation, gradient checkpointing).

A layer's activations take many times the memory of its input. `full` keeps only the input, and runs the layer once more
for its gradient. A list of names also keeps the activations that have those names: the fewer bytes a name takes for the
work it saves, the better. With LoRA the down-projected activations are the cheapest of all: one rank wide. Kept
activations may wait in the memory of the host (`offload`), if the platform has such memory.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive

Name = Literal["lora", "attention", "qkv", "attention_out", "mlp"]
Remat = Literal["none", "full", "dots"] | tuple[Name, ...]

SAVES: dict[str, tuple[str, ...]] = {
    "lora": (),
    "attention": (),
    "qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    "attention_out": ("o_proj",),
    "mlp": ("gate_proj", "up_proj", "gate_up_proj"),
}
"""Name of kept activations -> the projections that are then not computed again. `lora` is x Aᵀ of every adapter;
`attention` is the attention's output and its log-sum-exp; `attention_out` is what is added to the residual stream."""

DOTS: tuple[Name, ...] = ("lora", "qkv", "attention_out", "mlp")
"""The names that `dots` keeps: the results of products with weights."""

LAYER_INPUT = "layer_input"

HOST = "pinned_host"
"""The memory kind that offloaded arrays are kept in."""


def named(x: jax.Array, name: Name) -> jax.Array:
    """x under a name by which a policy may keep it."""
    return checkpoint_name(x, name)


def kept(remat: Remat) -> tuple[Name, ...]:
    """The names that a policy other than `none` keeps."""
    return {"full": (), "dots": DOTS}[remat] if isinstance(remat, str) else remat


def check(remat: Remat, offload: bool) -> None:
    """Raise ValueError if this is no valid policy."""
    if not isinstance(remat, str) and (unknown := sorted(set(remat) - set(get_args(Name)))):
        raise ValueError(f"remat: nothing is named {', '.join(unknown)}; names are {', '.join(get_args(Name))}")
    if isinstance(remat, str) and remat not in ("none", "full", "dots"):
        raise ValueError(f"remat is {remat!r}; choose none, full, dots or a list of names")
    if offload and remat == "none":
        raise ValueError("activations are not offloaded where remat is none; choose full, dots or a list of names")


def rematerialised(layer: Callable, remat: Remat, offload: bool, scanned: bool) -> Callable:
    """The layer (h, ...) -> ..., whose backward pass keeps what the policy says.

    Args:
        offload: kept activations, and the layer's input, wait in the host's memory.
        scanned: the layer is the body of a loop, which already keeps computation and recomputation apart.
    """
    check(remat, offload)
    if remat == "none":
        return layer
    checkpoint = partial(jax.checkpoint, prevent_cse=not scanned)
    names, policies = kept(remat), jax.checkpoint_policies
    if not offload:
        policy = policies.save_only_these_names(*names)
        if "attention" in names:
            policy = policies.save_from_both_policies(policy, _of_cudnn)
        return checkpoint(layer, policy=policy)

    def from_host(h, *rest):
        return layer(checkpoint_name(h, LAYER_INPUT), *rest)

    moved = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT, *names],
        offload_src="device",
        offload_dst=HOST,
    )
    return checkpoint(from_host, policy=moved)


def _of_cudnn(primitive: Primitive, *_: object, **__: object) -> bool:
    """Whether this is cuDNN's attention. Its log-sum-exp stays inside jax's function, so it cannot be named."""
    return primitive.name.startswith("dot_product_attention_fwd")
