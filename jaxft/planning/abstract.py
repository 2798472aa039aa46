"""The training step of a run, with shapes and shardings in place of arrays, for devices that need not exist here."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.adapters.attach import sites
from jaxft.config import Config
from jaxft.data.batch import Batch
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder, parameters
from jaxft.models.placement import bind
from jaxft.models.remat import HOST
from jaxft.quantization.qtensor import QTensor
from jaxft.sharding.layout import in_memory, layout_of
from jaxft.sharding.mesh import batch_sharding, batch_ways
from jaxft.training.optimizer import make_optimizer
from jaxft.training.recipe import Recipe
from jaxft.training.state import Partition, Trained, TrainState
from jaxft.training.step import make_train_step

PyTree = object


class AbstractStep:
    """The step that `jaxft.training` would jit for this config, model and mesh.

    Attributes:
        model: parameters are `jax.ShapeDtypeStruct`s with the shardings they would have.
        step: the jitted function.
        state, frozen, batch: its arguments.
        attention: the kernel that computes attention.
    """

    def __init__(self, config: Config, decoder: DecoderConfig, mesh: Mesh):
        recipe = Recipe(config, decoder)
        recipe.check(mesh)
        self.config, self.mesh, self.attention = config, mesh, recipe.attention(mesh)
        self.model = _on(mesh, recipe)
        partition = Partition(self.model, recipe.trained_type)
        trained, self.frozen = partition.split(self.model)
        optimizer = make_optimizer(config, config.max_steps or 1000, partition.names)
        self.state = _state(trained, optimizer, mesh, HOST if "optimizer" in config.offload else None)
        rows = config.micro_batch_size * batch_ways(mesh)
        self.tokens = rows * config.max_length  # of a micro-batch
        self.batch = _batch((config.gradient_accumulation_steps, rows, config.max_length), mesh)
        adapters = [site.linear.adapter for site in sites(self.model) if site.linear.adapter is not None]
        seed = config.seed if any(adapter.spec.dropout for adapter in adapters) else None
        self.step = make_train_step(
            partition, recipe.objective, optimizer, self.state, seed, config.router_aux_loss_coef, config.packing
        )

    def compile(self) -> jax.stages.Compiled:
        return self.step.lower(self.state, self.frozen, self.batch).compile()


def bytes_per_device(tree: PyTree) -> int:
    """Bytes of one device's shards in its own memory, for arrays or their descriptions; a 4-bit code is half a byte."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if leaf.sharding.memory_kind == HOST:
            continue
        shape = leaf.sharding.shard_shape(leaf.shape)
        info = jnp.iinfo if jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.finfo
        bits = 8 if leaf.dtype == jnp.bool_ else info(leaf.dtype).bits
        total += -(-jnp.prod(jnp.array(shape, float)).item() * bits // 8)
    return int(total)


def _on(mesh: Mesh, recipe: Recipe) -> Decoder:
    """The model, bound to the mesh as `load_model` and `attach` would, every leaf with its sharding."""
    model = recipe.describe()
    recipe.configure(model)
    bind(model, mesh)
    for parameter, variable in parameters(model):
        value = variable.get_value()
        block = value.format.block_in if isinstance(value, QTensor) else 1
        cut = layout_of(parameter.name, parameter.shape, mesh, block).stacked(value.ndim)
        if isinstance(value, QTensor):
            shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), value.specs(cut.spec, mesh))
            if jnp.iinfo(value.codes.dtype).bits == 4:
                shardings = replace(shardings, codes=in_memory(shardings.codes, value.ndim))
            variable.set_value(jax.tree.map(_placed, value, shardings))
        else:
            variable.set_value(_placed(value, cut))
    for site in sites(model):
        if site.linear.adapter is not None:
            for variable, sharding in site.linear.adapter.bind(site.linear.layout):
                variable.set_value(_placed(variable.get_value(), sharding))
    return model


def _placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding | Format) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _state(trained: Trained, optimizer: optax.GradientTransformation, mesh: Mesh, kept_in: str | None) -> TrainState:
    whole = NamedSharding(mesh, P())
    counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    moments = optax.tree.map_params(
        optimizer,
        lambda leaf, like: _placed(leaf, like.sharding.with_memory_kind(kept_in)),
        jax.eval_shape(optimizer.init, trained),
        trained,
        transform_non_params=lambda leaf: _placed(leaf, whole),
    )
    return TrainState(counter, trained, moments, counter, counter)


def _batch(shape: tuple[int, int, int], mesh: Mesh) -> Batch:
    sharding = batch_sharding(mesh, leading=1)
    return Batch(
        *(
            jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for dtype in (jnp.int32, jnp.bool_, jnp.int32, jnp.int32)
        )
    )
