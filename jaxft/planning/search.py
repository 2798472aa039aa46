"""Which mesh, micro batch and remat give a run the most tokens per second on a machine, of those that fit.

All candidates are ranked by an estimate that needs no compiler (the roofline of `cost`, with the collectives that the
mesh implies). Then the best are compiled in turn. One that does not fit rules out larger micro batches of its kind.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from jaxft.config import Config
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.remat import SAVES
from jaxft.planning.abstract import AbstractStep, bytes_per_device
from jaxft.planning.cost import products, times, work
from jaxft.planning.hlo import Collective
from jaxft.planning.machines import Topology
from jaxft.planning.plan import Plan, make_plan, slow_axes
from jaxft.sharding.mesh import batch_ways, make_mesh

LONG = 32768
"""Rows of so many tokens may be cut over the mesh axis `context`."""

MOST_TOKENS = 65536
"""In the micro batch of one device; more does not make products any faster."""

REMATS = ("full", "none", ["attention"], ["attention", "lora"])


class Candidate(NamedTuple):
    """A config to try, and what is estimated of it."""

    config: Config
    tokens_per_second: float


@dataclass(frozen=True)
class Search:
    """What was compiled, in that order, and the best of it; None where nothing fits."""

    tried: list[Plan]
    best: Plan | None


def search(
    config: Config,
    decoder: DecoderConfig,
    topology: Topology,
    compilations: int = 8,
    wanted: int = 3,
    say: Callable[[Plan], None] = lambda plan: None,
) -> Search:
    """Compile the most promising candidates until `wanted` of them fit or `compilations` were tried.

    Args:
        say: is told of every candidate that was compiled.
    """
    tried: list[Plan] = []
    too_large: list[Config] = []
    for candidate in ranked(config, decoder, topology):
        fitting = [plan for plan in tried if plan.fits]
        if len(tried) == compilations or len(fitting) == wanted:
            break
        if any(_at_least_as_large(candidate.config, than) for than in too_large):
            continue
        plan = make_plan(candidate.config, decoder, topology)
        say(plan)
        tried.append(plan)
        if not plan.fits:
            too_large.append(plan.config)
    fitting = [plan for plan in tried if plan.fits]
    return Search(tried, max(fitting, key=lambda plan: plan.tokens_per_second_per_device, default=None))


def ranked(config: Config, decoder: DecoderConfig, topology: Topology) -> list[Candidate]:
    """Every candidate whose weights alone fit, the fastest by estimate first; of equals the smallest."""
    found: list[Candidate] = []
    for sizes in meshes(config, decoder, len(topology.devices), topology.machine.host):
        mesh = make_mesh(sizes, topology.devices)
        step = AbstractStep(config.model_copy(update={"mesh": type(config.mesh)(**sizes)}), decoder, mesh)
        kept = bytes_per_device((step.frozen, step.state.trained, step.state.optimizer, step.state.trained))
        room, slow = topology.machine.capacity - kept, slow_axes(mesh, topology)
        if room <= 0:
            continue
        remats = [remat for remat in REMATS if remat != "none" or "activations" not in config.offload]
        for micro, remat in ((micro, remat) for remat in remats for micro in _micro_batches(config)):
            rows = micro * batch_ways(mesh)
            tokens = rows * config.max_length
            local = tokens / (batch_ways(mesh) * mesh.shape["context"])
            step.model.remat = remat if isinstance(remat, str) else tuple(remat)
            if least_activations(step.model, local) > room:
                continue
            done = work(step.model, rows, config.max_length, 1, config.adapter == "none")
            sent = list(_collectives(step, local))
            seconds = times(done, sent, topology.machine, mesh.size, slow).step
            update = {"mesh": type(config.mesh)(**sizes), "micro_batch_size": micro, "remat": remat}
            found.append(Candidate(config.model_copy(update=update), tokens / seconds / mesh.size))
    return sorted(found, key=lambda each: (-round(each.tokens_per_second), each.config.micro_batch_size))


def meshes(config: Config, decoder: DecoderConfig, devices: int, host: int) -> Iterator[dict[str, int]]:
    """Sensible ways to arrange so many devices for this model."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for tensor in divisors:
        if tensor > host or decoder.num_kv_heads % tensor:
            continue
        for context in divisors if config.max_length >= LONG else [1]:
            if devices % (tensor * context) or decoder.num_heads % (tensor * context) or config.max_length % context:
                continue
            for expert in divisors if decoder.experts else [1]:
                rest, left_over = divmod(devices, tensor * context * expert)
                if left_over or (expert > 1 and decoder.experts.count % expert):
                    continue
                for fsdp in {1, min(rest, host), rest}:
                    if rest % fsdp == 0:
                        data = rest // fsdp
                        yield {"data": data, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}


def least_activations(model: Decoder, local: float) -> float:
    """Bytes that activations take at least: what remat keeps of every layer, and a layer at work.

    Args:
        local: tokens of a device.
    """
    c, tensor = model.config, model.activations.mesh.shape["tensor"]
    layers = len(c.layers)
    sizes = dict.fromkeys(SAVES, 0.0) | {"attention": layers * c.num_heads * c.head_dim / tensor}
    every = 0.0
    for product in products(model):
        for name, modules in SAVES.items():
            cut = 1 if name == "attention_out" else tensor
            sizes[name] += product.features_out / cut if product.name.rpartition(".")[2] in modules else 0
        sizes["lora"] += layers * product.rank
        every += product.features_in / tensor
    inputs = layers * c.hidden_size
    match model.remat:
        case "none" | "dots":
            kept = inputs + every + sizes["mlp"] + sizes["qkv"]
        case "full":
            kept = inputs
        case names:
            kept = inputs + sum(sizes[name] for name in names)
    return 2 * local * (kept + 2 * (every + sizes["mlp"]) / layers)


def _micro_batches(config: Config) -> Iterator[int]:
    micro = 1
    while micro == 1 or micro * config.max_length <= MOST_TOKENS:
        yield micro
        micro *= 2


def _collectives(step: AbstractStep, local: float) -> Iterator[Collective]:
    """What the mesh makes devices send in one micro-batch of `local` tokens each, roughly: bfloat16 activations,
    weights as they are stored."""
    c, mesh = step.model.config, step.mesh.shape
    passes = 3 if step.model.remat == "full" else 2
    activations = len(c.layers) * local * c.hidden_size * 2

    def sent(kind: str, axis: str, bytes: float) -> Collective:
        return Collective(kind, (axis,), "", 0, int(bytes * (mesh[axis] - 1) / mesh[axis]))

    # What is computed again and its gradient share one gathering.
    yield sent("all-gather", "fsdp", 2 * bytes_per_device(step.frozen) * mesh["fsdp"])
    yield sent("all-reduce", "data", 2 * bytes_per_device(step.state.trained))
    yield sent("all-reduce", "tensor", 2 * 2 * passes * activations)
    yield sent("all-to-all", "context", 4 * passes * activations)
    if c.experts:
        yield sent("all-gather", "expert", 2 * passes * activations * mesh["expert"])


def _at_least_as_large(config: Config, than: Config) -> bool:
    """Whether it takes no less memory: the same mesh and remat with no smaller a micro batch."""
    same = config.mesh == than.mesh and config.remat == than.remat
    return same and config.micro_batch_size >= than.micro_batch_size
