"""A decoder layer: attention and feed-forward, each with the norms that the config names.

Axes: B batch, T tokens, D hidden.
"""

from collections.abc import Callable
from dataclasses import astuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.models.attention import Attention, LayerCache, Setting
from jaxft.models.config import DecoderConfig, LayerSpec
from jaxft.models.experts import Balance, ExpertLinear, Experts, Mixture, Router
from jaxft.models.keys import split
from jaxft.models.linear import Linear, Weight
from jaxft.models.mlp import MLP
from jaxft.models.norms import Norm

Make = Callable[..., Weight]
"""(name in the layer, *shape) -> the parameter's value, for all layers of a stack at once."""


class Layer(nnx.Module):
    """Attention, then feed-forward, or both in parallel, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, spec: LayerSpec, make: Make):
        c = self.config = config

        def linear(name: str, features_out: int, features_in: int, bias: bool) -> Linear:
            weight = make(f"{name}.weight", features_out, features_in)
            return Linear(weight, make(f"{name}.bias", features_out) if bias else None)

        def projections(block: str, sizes: dict[str, int], bias: bool) -> dict[str, Linear]:
            return {name: linear(f"{block}.{name}", size, c.hidden_size, bias) for name, size in sizes.items()}

        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        if c.fused_qkv:
            sizes = {"qkv_proj": q_size + 2 * kv_size}
        else:
            sizes = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        normed = {None: {}, "head": {"q_norm": c.head_dim, "k_norm": c.head_dim}}
        normed["projection"] = {"q_norm": q_size, "k_norm": kv_size}
        self.self_attn = Attention(
            c,
            spec,
            **projections("self_attn", sizes, c.qkv_bias),
            o_proj=linear("self_attn.o_proj", c.hidden_size, q_size, c.o_bias),
            sinks=make("self_attn.sinks", c.num_heads) if c.attention_sinks else None,
            **{name: norm(c, make, f"self_attn.{name}", size) for name, size in normed[c.qk_norm].items()},
        )

        def feed_forward(block: str, inner: int) -> MLP:
            if c.fused_gate_up:
                sizes = {"gate_up_proj": 2 * inner}
            else:
                sizes = {"gate_proj": inner, "up_proj": inner} if c.gated_mlp else {"up_proj": inner}
            down_proj = linear(f"{block}.down_proj", c.hidden_size, inner, c.mlp_bias)
            return MLP(c.activation, down_proj, **projections(block, sizes, c.mlp_bias))

        self.mlp = mixture(c, make, linear, feed_forward) if spec.sparse else feed_forward("mlp", c.intermediate_size)
        for name in filter(None, astuple(c.block_norms)):
            setattr(self, name, norm(c, make, name, c.hidden_size))

    def __call__(
        self,
        h: jax.Array,
        setting: Setting,
        cache: LayerCache | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache | None, Balance | None]:
        """h [B, T, D] -> [B, T, D], the layer's new cache, and the `Balance` of its router, if it has one."""
        attention_key, mlp_key = (None, None) if key is None else split(key)
        norms, scale = self.config.block_norms, jnp.asarray(self.config.residual_scale, h.dtype)

        def normed(name: str | None, x: jax.Array) -> jax.Array:
            return x if name is None else getattr(self, name)(x)

        def feed(x: jax.Array) -> tuple[jax.Array, Balance | None]:
            if isinstance(self.mlp, Mixture):
                return self.mlp(x, setting.segments, mlp_key)
            return self.mlp(x, mlp_key), None

        start = normed(norms.attention_in, h)
        mixed, cache = self.self_attn(start, setting, cache, attention_key)
        mixed = normed(norms.attention_out, mixed)
        if self.config.parallel:
            fed, balance = feed(start if norms.mlp_in is None else normed(norms.mlp_in, h))
            return h + scale * (mixed + fed), cache, balance
        h = h + scale * mixed
        fed, balance = feed(normed(norms.mlp_in, h))
        return h + scale * normed(norms.mlp_out, fed), cache, balance


def norm(config: DecoderConfig, make: Make, name: str, size: int) -> Norm:
    """The config's kind of norm over `size` features."""
    bias = make(f"{name}.bias", size) if config.norm == "layer_bias" else None
    return Norm(config.norm, make(f"{name}.weight", size), bias, config.norm_eps)


def mixture(
    config: DecoderConfig, make: Make, linear: Callable[..., Linear], feed_forward: Callable[[str, int], MLP]
) -> Mixture:
    """The router, the experts and, if the config has one, the expert that sees every token."""
    c, e = config, config.experts

    def projection(name: str, features_out: int, features_in: int) -> ExpertLinear:
        weight = make(f"mlp.experts.{name}.weight", e.count, features_out, features_in)
        return ExpertLinear(weight, make(f"mlp.experts.{name}.bias", e.count, features_out) if e.bias else None)

    inner = e.intermediate_size
    sizes = {"gate_up_proj": 2 * inner} if e.fused else {"gate_proj": inner, "up_proj": inner}
    projections = {name: projection(name, size, c.hidden_size) for name, size in sizes.items()}
    shared = None
    if e.shared_size is not None:
        gate = linear("mlp.shared_expert_gate", 1, c.hidden_size, False)
        shared = feed_forward("mlp.shared_expert", e.shared_size), gate
    weight = make("mlp.router.weight", e.count, c.hidden_size)
    router = Router(weight, make("mlp.router.bias", e.count) if e.router_bias else None)
    return Mixture(
        c, router, Experts(c, **projections, down_proj=projection("down_proj", c.hidden_size, inner)), shared
    )
