"""How long a step takes at best, from what it computes, moves in memory, and sends (a roofline; arXiv 2404.14527 for
the idea applied to language models).

Floating point operations are counted from the model, a product of [n, k] and [k, m] as 2 n k m. Per token, for P
parameters in products with weights: 2 P forward, 2 P for the gradient of the input, 2 P for that of the weight where
it is trained; what is computed again counts for the hardware, not for the model. So LoRA on a frozen base takes about
4 P, not 6 P, and 6 P in hardware with `remat: full`. Attention is causal, over rows that hold one example each; packed
rows take less.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from jaxft.models.decoder import Decoder, modules
from jaxft.models.experts import ExpertLinear
from jaxft.models.linear import Linear
from jaxft.planning.hlo import Collective
from jaxft.planning.machines import Machine
from jaxft.quantization.qtensor import QTensor
from jaxft.sharding.layout import ways

PRODUCTS, MEMORY, NETWORK = 0.7, 0.8, 0.7
"""What programs reach of the rates on data sheets: of products, of memory, of the network."""

HIDDEN_AXES = {"data", "fsdp"}
"""What is sent along these, the next layer's weights and the gradients, goes on while the chip computes."""


class Product(NamedTuple):
    """A weight's product with every token: its name, its parameters that one token meets, its sizes, its storage."""

    name: str
    active: float
    features: int  # in + out, of those that a token meets
    stored: float  # bytes, all layers and experts
    rank: int  # of its adapter; 0: none


class Work(NamedTuple):
    """Of one update: FLOPs of all devices together, bytes that one device moves in its memory."""

    model_flops: float
    hardware_flops: float
    memory_bytes: float


class Times(NamedTuple):
    """Seconds that each part of an update would take by itself."""

    products: float
    memory: float
    hidden_collectives: float
    exposed_collectives: float

    @property
    def step(self) -> float:
        return max(self.products, self.memory, self.hidden_collectives) + self.exposed_collectives

    @property
    def bound_by(self) -> str:
        parts = {
            "matrix products": self.products,
            "memory bandwidth": self.memory,
            "collectives": self.hidden_collectives + self.exposed_collectives,
        }
        return max(parts, key=parts.__getitem__)


def work(model: Decoder, rows: int, length: int, updates: int, full: bool) -> Work:
    """What one update takes.

    Args:
        model: with its adapters, and bound to its mesh.
        rows: of a micro-batch, over all devices.
        length: tokens of a row.
        updates: micro-batches of an update.
        full: every weight is trained, not adapters only.
    """
    c, mesh, tokens = model.config, model.activations.mesh, rows * length
    products = list(_products(model))
    linear = 2 * sum(product.active for product in products)
    adapters = 2 * sum(product.rank * product.features for product in products)
    pairs = sum(_pairs(length, spec.window) for spec in c.layers) / length
    attention = 4 * c.num_heads * c.head_dim * pairs
    head = 2 * c.vocab_size * c.hidden_size

    forward = linear + adapters + attention
    gradients = linear * (2 if full else 1) + 2 * adapters + 2 * attention
    needed = forward + gradients + head * (3 if full else 2)
    again = attention / 2 + (2 * head - head if full else 0)
    again += _recomputed(model, products, attention)
    passes = 3 if model.remat == "full" else 2
    return Work(
        needed * tokens * updates,
        (needed + again) * tokens * updates,
        updates * _memory(products, mesh, tokens, passes + full),
    )


def times(work: Work, collectives: Iterable[Collective], machine: Machine, devices: int, slow: set[str]) -> Times:
    """How long each part takes. `slow` are the axes of the mesh that run between slices or hosts."""
    hidden = exposed = 0.0
    for collective in collectives:
        rate = machine.dcn if slow & set(collective.axes) else machine.ici
        seconds = collective.bytes / (rate * NETWORK)
        if set(collective.axes) <= HIDDEN_AXES:
            hidden += seconds
        else:
            exposed += seconds
    return Times(
        work.hardware_flops / devices / (machine.flops * PRODUCTS),
        work.memory_bytes / (machine.bandwidth * MEMORY),
        hidden,
        exposed,
    )


def _products(model: Decoder) -> Iterable[Product]:
    """Those inside the layers, each stack of layers as one."""
    for name, layers, module in modules(model):
        if layers is None or not isinstance(module, Linear | ExpertLinear):
            continue
        weight = module.weight.get_value()
        *_, features_out, features_in = weight.shape
        met = len(layers) * (model.config.experts.per_token if isinstance(module, ExpertLinear) else 1)
        stored = weight.nbytes if isinstance(weight, QTensor) else math.prod(weight.shape) * weight.dtype.itemsize
        rank = 0 if module.adapter is None else module.adapter.spec.max_rank
        active = met * features_out * features_in
        yield Product(name, active, met * (features_out + features_in), stored, rank)


def _recomputed(model: Decoder, products: list[Product], attention: float) -> float:
    """FLOPs per token that the backward pass repeats, inside the layers."""
    if model.remat == "none":
        return 0
    if model.remat == "dots":
        return attention
    # The last product of a layer is what the next layer starts from, which is kept.
    again = [product for product in products if not product.name.endswith("down_proj")]
    return attention + sum(2 * (product.active + product.rank * product.features) for product in again)


def _pairs(length: int, window: int | None) -> float:
    """Queries and keys that see each other in a row."""
    window = length if window is None else min(window, length)
    return window * (window + 1) / 2 + (length - window) * window


def _memory(products: list[Product], mesh, tokens: int, passes: int) -> float:
    """Bytes that a device moves in one micro-batch.

    In every pass a weight is read as it is stored, and where it is quantized or gathered written and read once more in
    bfloat16; activations are written and read on both sides of a product, and once more between two.
    """
    local = tokens / ways(mesh, ("data", "fsdp", "expert", "context"))
    total = 0.0
    cut = ways(mesh, ("tensor", "expert"))
    for product in products:
        total += passes * (product.stored + 4 * product.active) / cut
        total += passes * 3 * 2 * local * product.features / ways(mesh, "tensor")
    return total
