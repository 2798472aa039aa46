"""What an array of a model is called, how large it is, and which tensors of a checkpoint it consists of."""

from dataclasses import dataclass

from jaxft.models.config import DecoderConfig


@dataclass(frozen=True)
class Parameter:
    """One array of the model as it is declared.

    Attributes:
        name: in this tree, without layer numbers.
        shape: without the layer axis; of experts: [experts, ...].
        layers: those it stacks; None: it is not stacked.
        experts: how many the checkpoint keeps in a tensor each; None: one tensor has all there is of a layer.
        names: of the Hugging Face tensors it consists of, in stacking order: by layer, then by expert.
        transposed: they are [..., in, out] there.
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
        """Of one of the stacked tensors."""
        return self.shape[1:] if self.experts else self.shape

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of one tensor in the checkpoint."""
        shape = self.tensor_shape
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        return (*self.stack, *self.tensor_shape)


def declared(config: DecoderConfig, name: str, shape: tuple[int, ...], layers: range | None = None) -> Parameter:
    """The parameter of a name and a shape, as `Parameter` has them, of the given layers."""
    mixture = config.experts if ".experts." in name else None
    experts = mixture.count if mixture and not mixture.fused else None
    transposed = name.endswith("_proj.weight") and (mixture.transposed if mixture else config.transposed)
    return Parameter(name, shape, layers, experts, config.names(name, layers, experts), transposed)
