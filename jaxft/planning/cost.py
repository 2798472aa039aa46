"""How long a step takes at best, from what it computes, moves in memory, and sends (a roofline; arXiv 2404.14527 for
the idea applied to language models).

A step is made of parts, one after the other: the products of the layers, attention, the loss, the optimizer. Each takes
as long as its products or as its traffic with the memory, whichever is longer, at the rates that programs reach.

Floating point operations are counted from the model, a product of [n, k] and [k, m] as 2 n k m. Per token, for P
parameters in products with weights: 2 P forward, 2 P for the gradient of the input, 2 P for the gradient of a
trained weight. Recomputation counts for the hardware, not for the model. So LoRA on a frozen base takes about 4 P, not
6 P, and 6 P in hardware with `remat: full`. Attention is causal, over rows that hold one example each; packed rows take
less.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from jaxft.models.decoder import Decoder, modules
from jaxft.models.experts import ExpertLinear
from jaxft.models.kernels import Kernel
from jaxft.models.linear import Linear
from jaxft.models.remat import SAVES, Remat, kept
from jaxft.planning.hlo import Collective
from jaxft.planning.machines import Machine
from jaxft.quantization.qtensor import QTensor
from jaxft.sharding.layout import ways

PRODUCTS, MEMORY, NETWORK = 0.7, 0.8, 0.7
"""The share of the rates on data sheets that programs reach: of products, of memory, of the network."""

BFLOAT16, FLOAT32 = 2, 4

_SCORE = 2 * FLOAT32 + 2 * BFLOAT16
"""Bytes moved for a score that does not stay on the chip: it is written and read, and so is its exponential."""

HIDDEN_AXES = {"data", "fsdp"}
"""Along these axes devices send the next layer's weights and the gradients, while the chip computes."""


class Product(NamedTuple):
    """A weight's products with one token, over all layers of a stack; of experts, only those that the token visits.

    Attributes:
        features_in, features_out: of one product, times `count`.
        active: parameters that the token uses.
        parameters: all parameters.
        stored: bytes of all parameters.
        converted: the weight is not stored in the dtype of the product.
        rank: of its adapter; 0 without an adapter.
        count: products: layers, times the experts that the token visits.
    """

    name: str
    features_in: int
    features_out: int
    active: int
    parameters: int
    stored: int
    converted: bool
    rank: int
    count: int

    @property
    def features(self) -> int:
        return self.features_in + self.features_out


class Part(NamedTuple):
    """What kernels of one kind do in an update: FLOPs of all devices together, bytes that one device moves."""

    name: str
    flops: float
    bytes: float


class Work(NamedTuple):
    """The work of one update. `model_flops` are those of the model; the parts' FLOPs include recomputation."""

    model_flops: float
    parts: tuple[Part, ...]

    @property
    def hardware_flops(self) -> float:
        return sum(part.flops for part in self.parts)

    @property
    def memory_bytes(self) -> float:
        return sum(part.bytes for part in self.parts)


class Times(NamedTuple):
    """Seconds of an update: parts that products bound, parts that memory bounds, and collectives, which run beside
    these parts (hidden) or delay them (exposed)."""

    products: float
    memory: float
    hidden_collectives: float
    exposed_collectives: float

    @property
    def step(self) -> float:
        return max(self.products + self.memory, self.hidden_collectives) + self.exposed_collectives

    @property
    def bound_by(self) -> str:
        if self.hidden_collectives > self.products + self.memory:
            return "collectives"
        parts = {
            "matrix products": self.products,
            "memory bandwidth": self.memory,
            "collectives": self.exposed_collectives,
        }
        return max(parts, key=parts.__getitem__)


def work(
    model: Decoder, rows: int, length: int, micro_batches: int, full: bool, kernel: Kernel, trained: int = 0
) -> Work:
    """The work of one update.

    Args:
        model: with its adapters, and bound to its mesh.
        rows: rows of a micro-batch, over all devices.
        length: tokens of a row.
        micro_batches: micro-batches of an update.
        full: every weight is trained, not adapters only.
        kernel: the kernel that computes attention.
        trained: bytes of the trained arrays, on one device.
    """
    c, mesh, tokens = model.config, model.activations.mesh, rows * length
    met = list(products(model))
    linear = 2 * sum(product.active for product in met)
    adapters = 2 * sum(product.rank * product.features for product in met)
    pairs = sum(_pairs(length, spec.window) for spec in c.layers) / length
    attention = 4 * c.num_heads * c.head_dim * pairs
    head = 2 * c.vocab_size * c.hidden_size

    # Per token: forward, gradients, and recomputation.
    inside = linear + adapters + linear * (2 if full else 1) + 2 * adapters
    needed = inside + 3 * attention + head * (3 if full else 2)
    keeps_attention = model.remat == "none" or "attention" in kept(model.remat)
    scores = 3.5 if keeps_attention else 4.5  # the backward pass always computes them once more
    local = tokens / ways(mesh, ("data", "fsdp", "expert", "context"))
    score_bytes = _SCORE * local * pairs * c.num_heads / ways(mesh, "tensor") if kernel == "blockwise" else 0
    of_a_micro_batch = (
        Part("layers", tokens * (inside + _recomputed(model, met)), _products_memory(model, met, local, full)),
        Part("attention", tokens * scores * attention, scores * score_bytes),
        Part("loss", tokens * head * (4 if full else 2), _head_memory(model, local, full)),
        Part("gradients", 0, 3 * trained),
    )
    parts = tuple(Part(name, micro_batches * f, micro_batches * b) for name, f, b in of_a_micro_batch)
    return Work(needed * tokens * micro_batches, (*parts, Part("optimizer", 0, 7 * trained)))


def times(work: Work, collectives: Iterable[Collective], machine: Machine, devices: int, slow: set[str]) -> Times:
    """How long the work takes. `slow` are the axes of the mesh that run between slices or hosts."""
    computing = moving = 0.0
    for part in work.parts:
        compute = part.flops / devices / (machine.flops * PRODUCTS)
        memory = part.bytes / (machine.bandwidth * MEMORY)
        if compute > memory:
            computing += compute
        else:
            moving += memory
    hidden = exposed = 0.0
    for collective in collectives:
        rate = machine.dcn if slow & set(collective.axes) else machine.ici
        seconds = collective.bytes / (rate * NETWORK)
        if set(collective.axes) <= HIDDEN_AXES:
            hidden += seconds
        else:
            exposed += seconds
    return Times(computing, moving, hidden, exposed)


def products(model: Decoder) -> Iterable[Product]:
    """The products inside the layers, one entry for each weight of a stack of layers."""
    for name, layers, module in modules(model):
        if layers is None or not isinstance(module, Linear | ExpertLinear):
            continue
        weight = module.weight.get_value()
        *_, features_out, features_in = weight.shape
        met = len(layers) * (model.config.experts.per_token if isinstance(module, ExpertLinear) else 1)
        active, parameters = met * features_out * features_in, math.prod(weight.shape)
        quantized = isinstance(weight, QTensor)
        stored = weight.nbytes if quantized else parameters * weight.dtype.itemsize
        converted = quantized or weight.dtype != model.dtype
        rank = 0 if module.adapter is None else module.adapter.spec.max_rank
        yield Product(name, met * features_in, met * features_out, active, parameters, stored, converted, rank, met)


def _is_recomputed(product: Product, remat: Remat) -> bool:
    """Whether the backward pass repeats the product; never a layer's last one, which gives the next layer's input."""
    if remat == "none":
        return False
    saved = {"down_proj"}.union(*(SAVES[name] for name in kept(remat)))
    return product.name.rpartition(".")[2] not in saved


def _recomputed(model: Decoder, met: list[Product]) -> float:
    """FLOPs per token of products with weights that the backward pass repeats, inside the layers."""
    total = 0
    for product in met:
        if _is_recomputed(product, model.remat):
            total += 2 * (product.active + product.rank * product.features_out)
        if model.remat != "none" and "lora" not in kept(model.remat):
            total += 2 * product.rank * product.features_in
    return total


def _pairs(length: int, window: int | None) -> float:
    """Pairs of a query and a key that it sees, in a row."""
    window = length if window is None else min(window, length)
    return window * (window + 1) / 2 + (length - window) * window


def _products_memory(model: Decoder, met: list[Product], local: float, full: bool) -> float:
    """Bytes that a device with `local` tokens moves for the products inside the layers, in one micro-batch.

    In every pass a weight is read as it is stored. A gathered weight is written first; a converted one is written and
    read once more. Activations are written and read on both sides of a product, and once more between two products.
    Only the experts that a token of the device visits count.
    """
    mesh, total = model.activations.mesh, 0.0
    for product in met:
        passes = 2 + full + _is_recomputed(product, model.remat)
        bytes = product.stored * (2 if mesh.shape["fsdp"] > 1 else 1)
        bytes += 2 * BFLOAT16 * product.parameters if product.converted else 0
        visited = min(1.0, local * mesh.shape["expert"] * product.active / product.parameters)
        total += passes * bytes * visited / ways(mesh, ("tensor", "expert"))
        total += passes * 3 * BFLOAT16 * local * product.features / ways(mesh, "tensor")
    return total


def _head_memory(model: Decoder, local: float, full: bool) -> float:
    """Bytes that a device moves for the loss: the head, and chunks of logits, once for each time they are computed."""
    c, mesh = model.config, model.activations.mesh
    passes = 2 if full else 1
    head = c.vocab_size * c.hidden_size * (2 * FLOAT32 if full else 2 * BFLOAT16)
    logits = local * c.vocab_size * (2 * FLOAT32 + 2 * BFLOAT16)  # and the operand of the gradient's product
    return passes * (head + logits) / ways(mesh, "tensor")
