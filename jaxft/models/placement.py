"""Bind a model to a device mesh: its modules learn how their weights lie and how activations are cut."""

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.models.decoder import Decoder, Embedding, modules, parameters
from jaxft.models.linear import Linear
from jaxft.quantization.qtensor import QTensor
from jaxft.sharding.layout import layout_of
from jaxft.sharding.mesh import batch_sharding


def bind(model: Decoder, mesh: Mesh) -> None:
    """Tell every weight's module its layout. The arrays are expected to lie that way already."""
    for name, layers, module in modules(model):
        if isinstance(module, Linear | Embedding):
            weight = module.weight.get_value()
            shape = weight.shape if layers is None else weight.shape[1:]
            block = weight.format.block_in if isinstance(weight, QTensor) else 1
            module.layout = layout_of(f"{name}.weight", shape, mesh, block)
    model.activations = batch_sharding(mesh)


def place(model: Decoder, mesh: Mesh) -> None:
    """Move an unquantized model onto a mesh and bind it."""
    bind(model, mesh)
    for parameter, variable in parameters(model):
        layout = layout_of(parameter.name, parameter.shape, mesh)
        spec = layout.stored if parameter.layers is None else P(None, *layout.stored)
        variable.set_value(jax.device_put(variable.get_value(), NamedSharding(mesh, spec)))
