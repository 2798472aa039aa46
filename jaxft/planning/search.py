"""Find the mesh, micro-batch and remat that give a run the most tokens per second, among those that fit a machine.

The number of rows in an update stays the same, so that the run learns the same. So larger micro-batches mean fewer of
them, and a mesh that cuts rows into more parts than there are rows is no candidate.

All candidates are ranked by an estimate that needs no compiler (the roofline of `cost`, with the collectives that the
mesh implies). Then the best are compiled in turn. One that does not fit rules out candidates at least as large.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from jaxft.config import Config
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.remat import SAVES, Remat, kept
from jaxft.planning.abstract import AbstractStep, bytes_per_device
from jaxft.planning.cost import products, times, work
from jaxft.planning.hlo import Collective
from jaxft.planning.machines import Topology
from jaxft.planning.plan import Plan, make_plan, slow_axes
from jaxft.sharding.mesh import batch_ways, make_mesh

LONG = 32768
"""Rows of at least this many tokens may be cut over the mesh axis `context`."""

MOST_TOKENS = 65536
"""Most tokens in the micro-batch of one device; more would not make products faster."""

REMATS: tuple[str | list[str], ...] = (
    "full",
    ["attention", "lora"],
    ["attention", "lora", "qkv", "attention_out"],
    ["attention", "lora", "mlp"],
    ["attention", "lora", "qkv", "attention_out", "mlp"],
    "none",
)
"""From least to most memory. `lora` takes almost none."""


class Candidate(NamedTuple):
    """A config to try, and its estimated speed."""

    config: Config
    tokens_per_second: float


@dataclass(frozen=True)
class Search:
    """The plans that were compiled, in order; `best` is None if nothing fits."""

    tried: list[Plan]

    @property
    def best(self) -> Plan | None:
        """The fastest that fits."""
        fitting = [plan for plan in self.tried if plan.fits]
        return max(fitting, key=lambda plan: plan.tokens_per_second_per_device, default=None)

    @property
    def smallest(self) -> Plan:
        return min(self.tried, key=lambda plan: plan.memory.total)


def search(
    config: Config,
    decoder: DecoderConfig,
    topology: Topology,
    compilations: int = 8,
    wanted: int = 3,
    say: Callable[[Plan], None] = lambda plan: None,
) -> Search:
    """Compile the most promising candidates until `wanted` of them fit or `compilations` were tried. If none fits, also
    compile the candidate that takes the least memory.

    Args:
        config: its mesh, micro-batch and accumulation define the number of rows in an update.
        say: is called with each plan that was compiled.

    Raises:
        ValueError: the config's mesh does not fit the devices.
    """
    found, too_large = Search([]), []

    def compile(candidate: Config) -> None:
        plan = make_plan(candidate, decoder, topology)
        say(plan)
        found.tried.append(plan)
        if not plan.fits:
            too_large.append(candidate)

    for candidate in ranked(config, decoder, topology):
        if len(found.tried) == compilations or sum(plan.fits for plan in found.tried) == wanted:
            break
        if not any(_at_least_as_large(candidate.config, than) for than in too_large):
            compile(candidate.config)
    if found.best is None:
        leanest = _arranged(config, {"fsdp": len(topology.devices)}, 1, "full", rows_of(config, topology))
        if not any(_at_least_as_large(leanest, than) for than in too_large):
            compile(leanest)
    return found


def ranked(config: Config, decoder: DecoderConfig, topology: Topology) -> list[Candidate]:
    """Candidates whose weights and least activations fit, fastest by estimate first; of equals, smallest first."""
    found: list[Candidate] = []
    rows, machine = rows_of(config, topology), topology.machine
    for sizes in meshes(config, decoder, len(topology.devices), machine.host):
        mesh = make_mesh(sizes, topology.devices)
        if rows % batch_ways(mesh):
            continue
        step = AbstractStep(_arranged(config, sizes, 1, "full", rows), decoder, mesh)
        trained = bytes_per_device(step.state.trained)
        held = bytes_per_device((step.frozen, step.state.optimizer)) + 2 * trained
        room, slow = machine.capacity - held, slow_axes(mesh, topology)
        if room <= 0:
            continue
        for remat in (each for each in REMATS if each != "none" or "activations" not in config.offload):
            step.model.remat = remat if isinstance(remat, str) else tuple(remat)
            for micro in _micro_batches(rows // batch_ways(mesh), config.max_length):
                together = micro * batch_ways(mesh)
                local = micro * config.max_length / mesh.shape["context"]
                if least_activations(step.model, local) > room:
                    continue
                full, times_over = config.adapter == "none", rows // together
                done = work(step.model, together, config.max_length, times_over, full, step.attention.kernel, trained)
                sent = [each._replace(bytes=each.bytes * times_over) for each in _collectives(step, local)]
                seconds = times(done, sent, machine, mesh.size, slow).step
                speed = rows * config.max_length / seconds / mesh.size
                found.append(Candidate(_arranged(config, sizes, micro, remat, rows), speed))
    return sorted(found, key=lambda each: (-round(each.tokens_per_second), each.config.micro_batch_size))


def rows_of(config: Config, topology: Topology) -> int:
    """The number of rows in an update of this config.

    Raises:
        ValueError: its mesh does not fit the devices.
    """
    mesh = make_mesh(config.mesh.model_dump(), topology.devices)
    return config.micro_batch_size * config.gradient_accumulation_steps * batch_ways(mesh)


def _arranged(config: Config, sizes: dict[str, int], micro: int, remat: Remat | list[str], rows: int) -> Config:
    """The config on another mesh, with other micro-batches. An update has `rows` rows, at least one micro-batch."""
    mesh = type(config.mesh)(**{"data": 1} | sizes)
    together = micro * mesh.data * mesh.fsdp * mesh.expert
    update = {
        "mesh": mesh,
        "micro_batch_size": micro,
        "gradient_accumulation_steps": max(1, rows // together),
        "remat": remat,
    }
    return config.model_copy(update=update)


def meshes(config: Config, decoder: DecoderConfig, devices: int, host: int) -> Iterator[dict[str, int]]:
    """Sensible meshes of this many devices for this model."""
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
    """The least bytes of activations: what remat keeps of every layer, and all of the layer that is running.

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
        sizes["lora"] += product.count * product.rank
        every += product.features_in / tensor
    saved = layers * c.hidden_size  # the layers' inputs
    if model.remat == "none":
        saved += every + sizes["mlp"] + sizes["qkv"]
    else:
        saved += sum(sizes[name] for name in kept(model.remat))
    return 2 * local * (saved + 2 * (every + sizes["mlp"]) / layers)


def _micro_batches(rows: int, length: int) -> Iterator[int]:
    """Sizes of micro-batch into which a data-parallel group can cut its `rows` of an update."""
    for micro in range(1, rows + 1):
        if rows % micro == 0 and (micro == 1 or micro * length <= MOST_TOKENS):
            yield micro


def _collectives(step: AbstractStep, local: float) -> Iterator[Collective]:
    """Roughly what each device sends in one micro-batch of `local` tokens: bfloat16 activations, and weights in their
    stored form."""
    c, mesh = step.model.config, step.mesh.shape
    names = SAVES.keys() if step.model.remat == "none" else kept(step.model.remat)
    activations = len(c.layers) * local * c.hidden_size * 2

    def sent(kind: str, axis: str, bytes: float) -> Collective:
        return Collective(kind, (axis,), "", 0, int(bytes * (mesh[axis] - 1) / mesh[axis]))

    # Recomputation and gradient share one gather. Trained weights are gathered in half of their float32 bytes.
    frozen, trained = bytes_per_device(step.frozen), bytes_per_device(step.state.trained)
    yield sent("all-gather", "fsdp", (2 * frozen + trained) * mesh["fsdp"])
    yield sent("reduce-scatter", "fsdp", trained * mesh["fsdp"])
    yield sent("all-reduce", "data", 2 * trained)
    # Attention and feed-forward have a sum each, forward and backward; recomputation may repeat that of attention.
    yield sent("all-reduce", "tensor", 2 * (4 if "attention_out" in names else 5) * activations)
    yield sent("all-to-all", "context", (8 if "attention" in names else 12) * activations)
    if c.experts:
        yield sent("all-gather", "expert", (4 if "mlp" in names else 6) * activations * mesh["expert"])


def _at_least_as_large(config: Config, than: Config) -> bool:
    """Whether `config` takes at least the memory of `than`: same mesh, micro-batch no smaller, remat keeps no less."""
    keeps_less = REMATS.index(config.remat) < REMATS.index(than.remat)
    return config.mesh == than.mesh and config.micro_batch_size >= than.micro_batch_size and not keeps_less
