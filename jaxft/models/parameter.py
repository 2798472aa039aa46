"""The declaration of a model's array: its name, its shape, and the tensors of a checkpoint that it consists of."""

from dataclasses import dataclass

from jaxft.models.config import DecoderConfig


@dataclass(frozen=True)
class Parameter:
    """One declared array of the model.

    Attributes:
        name: its name in the model's tree, without layer numbers.
        shape: without the layer axis; [experts, ...] for experts.
        layers: the layers it stacks; None if it is not stacked.
        experts: how many experts have their own tensor in the checkpoint; None if one tensor holds all of a layer.
        names: the Hugging Face tensors it consists of, in stacking order: by layer, then by expert.
        transposed: the checkpoint stores them as [..., in, out].
    """

    name: str
    shape: tuple[int, ...]
    layers: range | None
    experts: int | None
    names: tuple[str, ...]
    transposed: bool

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes along which the tensors of the checkpoint are stacked; () for a single tensor."""
        return (() if self.layers is None else (len(self.layers),)) + ((self.experts,) if self.experts else ())

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of one of the stacked tensors."""
        return self.shape[1:] if self.experts else self.shape

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of one tensor in the checkpoint."""
        shape = self.tensor_shape
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        return (*self.stack, *self.tensor_shape)


def declared(config: DecoderConfig, name: str, shape: tuple[int, ...], layers: range | None = None) -> Parameter:
    """The `Parameter` with this name and shape, for the given layers."""
    mixture = config.experts if ".experts." in name else None
    experts = mixture.count if mixture and not mixture.fused else None
    transposed = name.endswith("_proj.weight") and (mixture.transposed if mixture else config.transposed)
    return Parameter(name, shape, layers, experts, config.names(name, layers, experts), transposed)
