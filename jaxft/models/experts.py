"""A mixture of experts in place of the feed-forward (arXiv 1701.06538, 2101.03961): a router in float32 chooses a few
experts for each token, and their outputs are added, weighted by the router's probabilities.

Tokens are sorted by expert and multiplied group by group (`grouped`): exact, whatever the load of an expert. On a mesh
each device along the axis `expert` holds some of the experts. It gathers the tokens of all devices along that axis and
computes what its experts add to them; the sums are scattered back.

Axes: B batch, T tokens, D hidden, I inner, E experts, k experts of a token, N tokens, M = kN rows.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxft.models.config import DecoderConfig
from jaxft.models.grouped import grouped_matmul
from jaxft.models.keys import split
from jaxft.models.linear import Linear, LinearAdapter, Weight
from jaxft.models.mlp import MLP, gated
from jaxft.models.remat import named
from jaxft.quantization.nf4 import NF4
from jaxft.quantization.qtensor import QTensor
from jaxft.sharding.layout import Layout
from jaxft.sharding.mesh import BATCH_AXES, batch_ways


class Balance(NamedTuple):
    """How a router distributed the tokens of a layer, not counting padding. For the balancing loss."""

    chosen: jax.Array  # [E] how often each expert was chosen
    probability: jax.Array  # [E] summed over tokens
    tokens: jax.Array  # scalar, how many


class Router(nnx.Module):
    """Scores of experts, from `weight` [E, D] and an optional `bias` [E]. It takes no adapter."""

    def __init__(self, weight: jax.Array, bias: jax.Array | None):
        self.weight = nnx.Param(weight)
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Probabilities [..., E] float32 of the experts for x [..., D]."""
        weight = self.weight[...].astype(jnp.float32)
        scores = jnp.einsum("...d,ed->...e", x.astype(jnp.float32), weight, precision="highest")
        return jax.nn.softmax(scores if self.bias is None else scores + self.bias[...].astype(jnp.float32))


class Projection(NamedTuple):
    """The arrays of an `ExpertLinear` without layer axis, or the `PartitionSpec`s of these arrays."""

    weight: Weight
    bias: jax.Array | None
    A: jax.Array | None
    B: jax.Array | None
    scale: jax.Array | None

    def __call__(self, x: jax.Array, sizes: jax.Array, expert: jax.Array, cuts: "Projection") -> jax.Array:
        """x [M, in], each row with its expert's weights -> [M, out]; see `grouped_matmul`."""
        y = grouped_matmul(x, self.weight, sizes, cuts.weight)
        if self.A is not None:
            z = named(self.scale[expert][:, None].astype(x.dtype) * grouped_matmul(x, self.A, sizes, cuts.A), "lora")
            y = y + grouped_matmul(z, self.B, sizes, cuts.B)
        return y if self.bias is None else y + self.bias[expert].astype(y.dtype)


class ExpertLinear(nnx.Module):
    """One projection of all experts of a layer: `weight` [E, out, in]; `bias` [E, out] and a LoRA are optional."""

    def __init__(self, weight: Weight, bias: jax.Array | None = None):
        self.weight = nnx.Param(weight)
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))
        self.adapter: LinearAdapter | None = nnx.data(None)
        self.layout: Layout | None = None

    def arrays(self) -> Projection:
        weight, lora = self.weight.get_value(), self.adapter
        if self.layout is not None and isinstance(weight, QTensor) and isinstance(weight.format, NF4):
            weight = weight.format.plain(weight)  # a shard of the matrix does not hold whole blocks of nested scales
        bias = None if self.bias is None else self.bias[...]
        return Projection(weight, bias, *((None,) * 3 if lora is None else (lora.A[...], lora.B[...], lora.scale[...])))

    def cuts(self, arrays: Projection) -> Projection:
        """The `PartitionSpec` of each array on the mesh."""
        if self.layout is None:
            return Projection(None, None, None, None, None)
        stored, lora, weight = self.layout.stored, self.adapter, arrays.weight
        return Projection(
            weight.specs(stored, self.layout.mesh) if isinstance(weight, QTensor) else stored,
            None if self.bias is None else P(*self.layout.gathered[:2]),
            *((None,) * 3 if lora is None else (lora.layout_A.stored, lora.layout_B.stored, P(stored[0]))),
        )


class Experts(nnx.Module):
    """Projections `gate_proj`, `up_proj` and `down_proj`, or `gate_up_proj` for the first two."""

    def __init__(self, config: DecoderConfig, **projections: ExpertLinear):
        for name, projection in projections.items():
            setattr(self, name, projection)
        self.names = tuple(projections)
        self.config = config

    def __call__(self, x: jax.Array, chosen: jax.Array, shares: jax.Array) -> jax.Array:
        """The chosen experts' weighted sum for x [B, T, D]; chosen [B, T, k] int32, shares [B, T, k] float32."""
        arrays = {name: getattr(self, name).arrays() for name in self.names}
        cuts = {name: getattr(self, name).cuts(arrays[name]) for name in self.names}
        layout = self.down_proj.layout
        run = partial(_run, cuts=cuts, config=self.config)
        if layout is None:
            return run(x, chosen, shares, arrays)
        count, length = x.shape[:2]
        rows = P(BATCH_AXES, "context" if length % layout.mesh.shape["context"] == 0 else None)
        missing = -count % batch_ways(layout.mesh)  # rows of padding, so that all devices get equally many
        x, chosen, shares = (jnp.pad(each, ((0, missing), (0, 0), (0, 0))) for each in (x, chosen, shares))
        specs = (rows, rows, rows, cuts)
        return jax.shard_map(
            partial(run, mesh=layout.mesh), mesh=layout.mesh, in_specs=specs, out_specs=rows, check_vma=False
        )(x, chosen, shares, arrays)[:count]


class Mixture(nnx.Module):
    """`router` and `experts` and, if the config has one, a `shared_expert` that sees every token, weighted by
    `shared_expert_gate`."""

    def __init__(self, config: DecoderConfig, router: Router, experts: Experts, shared: tuple[MLP, Linear] | None):
        self.router, self.experts = router, experts
        self.shared_expert, self.shared_expert_gate = (nnx.data(part) for part in shared or (None, None))
        self.config = config

    def __call__(
        self, x: jax.Array, segments: jax.Array | None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Balance]:
        """x [B, T, D] -> [B, T, D]; `segments` [B, T] is 0 at padding, which the balance does not count."""
        sparse = self.config.experts
        probabilities = self.router(x)
        shares, chosen = jax.lax.top_k(probabilities, sparse.per_token)
        if sparse.normalized:
            shares = shares / shares.sum(axis=-1, keepdims=True)
        y = self.experts(x, chosen, shares)
        if self.shared_expert is not None:
            keys = (None, None) if key is None else split(key)
            gate = jax.nn.sigmoid(self.shared_expert_gate(x, keys[0]).astype(jnp.float32)).astype(x.dtype)
            y = y + gate * self.shared_expert(x, keys[1])
        real = jnp.ones(x.shape[:2]) if segments is None else (segments > 0).astype(jnp.float32)
        weights = jnp.broadcast_to(real[..., None], chosen.shape)
        counts = jnp.zeros(sparse.count).at[chosen.reshape(-1)].add(weights.reshape(-1))
        return y, Balance(counts, jnp.einsum("bte,bt->e", probabilities, real), real.sum())


def load_balancing_loss(balances: list[Balance]) -> jax.Array:
    """E times the sum over experts of: the share of tokens that an expert got times its mean probability.

    Both are means over tokens and layers. The loss is k if all experts get the same (arXiv 2101.03961, equations 4 to
    6, for k experts of a token). Only the probabilities have a gradient, not the shares.

    Args:
        balances: one for each stack of layers; leading axes are summed.
    """
    chosen = sum(b.chosen.reshape(-1, b.chosen.shape[-1]).sum(axis=0) for b in balances)
    probability = sum(b.probability.reshape(-1, b.chosen.shape[-1]).sum(axis=0) for b in balances)
    tokens = jnp.maximum(sum(b.tokens.sum() for b in balances), 1)
    return chosen.shape[0] * jnp.sum(chosen * probability) / tokens**2


def _run(
    x: jax.Array,
    chosen: jax.Array,
    shares: jax.Array,
    arrays: dict[str, Projection],
    *,
    cuts: dict[str, Projection],
    config: DecoderConfig,
    mesh: Mesh | None = None,
) -> jax.Array:
    """What the chosen experts add to x [B, T, D]. With a mesh this runs on one device, for its rows."""
    down, down_cut = arrays["down_proj"], cuts["down_proj"].weight
    names = () if mesh is None else _axes(down_cut if isinstance(down_cut, P) else down_cut.codes)
    spread = "expert" in names
    if spread:
        x, chosen, shares = (jax.lax.all_gather(each, "expert", axis=0, tiled=True) for each in (x, chosen, shares))
    own, k = down.weight.shape[0], chosen.shape[-1]
    expert, shares = chosen.reshape(-1), shares.reshape(-1)
    if spread:
        expert = expert - jax.lax.axis_index("expert") * own
        elsewhere = (expert < 0) | (expert >= own)
        expert, shares = jnp.where(elsewhere, own, expert), jnp.where(elsewhere, 0.0, shares)
    if "tensor" in names and down.bias is not None:  # one device adds the bias, before the sum over the axis
        first = jax.lax.axis_index("tensor") == 0
        arrays = arrays | {"down_proj": down._replace(bias=jnp.where(first, down.bias, jnp.zeros((), down.bias.dtype)))}

    order = jnp.argsort(expert, stable=True)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=order.dtype))
    sizes = jnp.zeros(own, jnp.int32).at[expert].add(1, mode="drop")
    expert = jnp.minimum(expert[order], own - 1)

    def project(name: str, rows: jax.Array) -> jax.Array:
        return arrays[name](rows, sizes, expert, cuts[name])

    taken = _take(x.reshape(-1, x.shape[-1]), order, back, k)
    if "gate_up_proj" in arrays:
        both = named(project("gate_up_proj", taken), "mlp")
        # Slices with a step would take the TPU compiler minutes.
        gate, up = jnp.moveaxis(both.reshape(both.shape[0], -1, 2), -1, 0)
    else:
        gate, up = (named(project(name, taken), "mlp") for name in ("gate_proj", "up_proj"))
    inner = gated(gate, up, config.activation, config.experts.clamp)
    if mesh is not None and inner.shape[-1] < down.weight.shape[-1]:
        inner = jax.lax.all_gather(inner, "tensor", axis=1, tiled=True)
    y = _combine(project("down_proj", inner), shares, order, back, k).reshape(x.shape)
    if "tensor" in names:
        y = jax.lax.psum(y, "tensor")
    return jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True) if spread else y


def _axes(spec: P) -> set[str]:
    """The mesh axes that a spec cuts over."""
    return {name for cut in spec if cut is not None for name in ((cut,) if isinstance(cut, str) else cut)}


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _take(x: jax.Array, order: jax.Array, back: jax.Array, k: int) -> jax.Array:
    """Each row of x [N, D] k times, in the given order: [kN, D]. The backward pass is a gather, too."""
    return x[order // k]


def _take_forward(x, order, back, k):
    return _take(x, order, back, k), back


def _take_backward(k, back, dy):
    dy = dy[back].reshape(-1, k, dy.shape[-1])
    return dy.astype(jnp.float32).sum(axis=1).astype(dy.dtype), None, None


_take.defvjp(_take_forward, _take_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _combine(y: jax.Array, shares: jax.Array, order: jax.Array, back: jax.Array, k: int) -> jax.Array:
    """Rows y [kN, D], back in token order, times their shares [kN]; each token's k rows summed in float32: [N, D]."""
    weighted = y[back].astype(jnp.float32) * shares[:, None]
    return weighted.reshape(-1, k, y.shape[-1]).sum(axis=1).astype(y.dtype)


def _combine_forward(y, shares, order, back, k):
    return _combine(y, shares, order, back, k), (y, shares, order, back)


def _combine_backward(k, residuals, d_out):
    y, shares, order, back = residuals
    d_rows = d_out[order // k].astype(jnp.float32)
    d_shares = jnp.sum(y.astype(jnp.float32) * d_rows, axis=-1)[back]
    return (d_rows * shares[order][:, None]).astype(y.dtype), d_shares, None, None


_combine.defvjp(_combine_forward, _combine_backward)
