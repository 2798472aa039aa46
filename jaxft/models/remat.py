"""What the backward pass computes again instead of keeping it (rematerialisation, gradient checkpointing).

Between a layer's input and its output lie activations of many times its size. `full` keeps the input only, and runs
the layer once more when its gradient is wanted. A list of names keeps, besides, what goes by those names: the fewer
bytes a name takes for the work it saves, the better. With LoRA the down-projected activations are the cheapest of
all: a rank wide. What is kept may wait in the memory of the host (`offload`), where the platform has such memory.
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
"""Name of what is kept -> the projections that are then not computed again. `lora` is x Aᵀ of every adapter;
`attention` the output of the attention and its log-sum-exp; `attention_out` what is added to the residual stream."""

DOTS: tuple[Name, ...] = ("lora", "qkv", "attention_out", "mlp")
"""What `dots` keeps: the results of products with weights."""

LAYER_INPUT = "layer_input"

HOST = "pinned_host"
"""The memory kind that offloaded arrays are kept in."""


def named(x: jax.Array, name: Name) -> jax.Array:
    """x, which a list of names may keep."""
    return checkpoint_name(x, name)


def kept(remat: Remat) -> tuple[Name, ...]:
    """The names that a policy other than `none` keeps."""
    return {"full": (), "dots": DOTS}[remat] if isinstance(remat, str) else remat


def check(remat: Remat, offload: bool) -> None:
    """Raise ValueError for what is no policy."""
    if not isinstance(remat, str) and (unknown := sorted(set(remat) - set(get_args(Name)))):
        raise ValueError(f"remat: nothing is named {', '.join(unknown)}; names are {', '.join(get_args(Name))}")
    if isinstance(remat, str) and remat not in ("none", "full", "dots"):
        raise ValueError(f"remat is {remat!r}; choose none, full, dots or a list of names")
    if offload and remat == "none":
        raise ValueError("activations are not offloaded where remat is none; choose full, dots or a list of names")


def rematerialised(layer: Callable, remat: Remat, offload: bool, scanned: bool) -> Callable:
    """The layer (h, ...) -> ..., whose backward pass keeps what the policy says.

    Args:
        offload: what is kept, the layer's input with it, waits in the host's memory.
        scanned: it is the body of a loop, which already keeps the two computations apart.
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
    """Whether it is cuDNN's attention, whose log-sum-exp stays inside of jax's function, out of reach of names."""
    return primitive.name.startswith("dot_product_attention_fwd")
