"""Bind a model to a device mesh: its modules learn how weights and activations are cut."""

from jax.sharding import Mesh

from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder, modules
from jaxft.models.embedding import Embedding
from jaxft.models.experts import ExpertLinear
from jaxft.models.linear import Linear
from jaxft.quantization.qtensor import QTensor
from jaxft.sharding.layout import layout_of
from jaxft.sharding.mesh import batch_sharding


def bind(model: Decoder, mesh: Mesh) -> None:
    """Give every module that has a weight its layout. The arrays must already be cut that way."""
    for name, layers, module in modules(model):
        if isinstance(module, Linear | ExpertLinear | Embedding):
            weight = module.weight.get_value()
            shape = weight.shape if layers is None else weight.shape[1:]
            block = weight.format.block_in if isinstance(weight, QTensor) else 1
            module.layout = layout_of(f"{name}.weight", shape, mesh, block)
    model.activations = batch_sharding(mesh)


def check_mesh(config: DecoderConfig, mesh: Mesh) -> None:
    """Raise ValueError if the model's experts (it may have none) or heads cannot be cut evenly over the mesh."""
    ways, count = mesh.shape["expert"], config.experts.count if config.experts else 0
    if ways > 1 and (count == 0 or count % ways):
        there_are = f"of {count} experts in a layer" if count else "but this model has none; use data or fsdp"
        raise ValueError(f"mesh: expert={ways} shares out experts evenly, {there_are}")
    context, tensor, heads = mesh.shape["context"], mesh.shape["tensor"], config.num_heads
    if context > 1 and heads % (context * tensor):
        fitting = [str(size) for size in range(1, heads + 1) if heads % (size * tensor) == 0]
        choose = f"context may be {' or '.join(fitting)}" if fitting else f"choose a tensor that divides {heads}"
        raise ValueError(
            f"mesh: context={context} x tensor={tensor} shares out the heads of attention evenly, "
            f"but this model has {heads}; with tensor={tensor}, {choose}"
        )
