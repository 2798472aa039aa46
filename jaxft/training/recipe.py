"""Derives from a config how to store the base model and what to train."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxft.adapters.attach import attach
from jaxft.adapters.targets import LoraConfig
from jaxft.config import Config
from jaxft.models.config import DecoderConfig, Source
from jaxft.models.decoder import Decoder, describe_model
from jaxft.models.kernels import Backend, Choice, choice
from jaxft.models.linear import Adapter
from jaxft.models.placement import check_mesh
from jaxft.models.remat import Remat, kept
from jaxft.objectives.dft import Dft
from jaxft.objectives.objective import Objective
from jaxft.objectives.sft import Sft
from jaxft.quantization.formats import parse_format
from jaxft.quantization.qtensor import Format

OBJECTIVES: dict[str, Objective] = {"nll": Sft(), "dft": Dft()}
"""`loss_type` -> objective."""


@dataclass(frozen=True)
class Recipe:
    """A config and the decoder that it trains."""

    config: Config
    decoder: DecoderConfig

    def check(self, mesh: Mesh) -> None:
        """Raise ValueError if the config does not fit the model, the length of rows, or this mesh."""
        check_mesh(self.decoder, mesh)
        length, parts = self.config.max_length, mesh.shape["context"]
        if length % parts:
            below = length // parts * parts
            fitting = " or ".join(str(n) for n in (below, below + parts) if n)
            raise ValueError(
                f"`max_length` is {length}, which mesh.context={parts} does not divide; set it to {fitting}"
            )
        if self.config.router_aux_loss_coef and self.decoder.experts is None:
            raise ValueError(
                "router_aux_loss_coef balances a mixture of experts, and this model has none; leave it out"
            )

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.config.loss_type]

    @property
    def trained_type(self) -> type[nnx.Variable]:
        return nnx.Param if self.config.adapter == "none" else Adapter

    @property
    def quantization(self) -> Format | None:
        kind = self.config.quant_type
        if kind is None:
            return None
        group_size = self.config.quant_group_size if kind == "int4" else None
        return parse_format(kind, double_quant=self.config.use_double_quant, group_size=group_size)

    @property
    def remat(self) -> Remat:
        return self.config.remat if isinstance(self.config.remat, str) else tuple(self.config.remat)

    @property
    def storage(self) -> str:
        """dtype of stored weights: float32 if they are trained, whatever the dtype of computation."""
        return "float32" if self.config.adapter == "none" else self.config.dtype

    @property
    def lora(self) -> LoraConfig:
        c = self.config
        return LoraConfig(
            r=c.lora_r,
            lora_alpha=c.lora_alpha,
            target_modules=c.lora_target_modules,
            target_parameters=c.lora_target_parameters,
            lora_dropout=c.lora_dropout,
            use_rslora=c.use_rslora,
            use_dora=c.use_dora,
            rank_pattern=c.rank_pattern,
            alpha_pattern=c.alpha_pattern,
        )

    def attention(self, mesh: Mesh) -> Choice:
        """Which kernel computes attention, and why.

        Raises:
            ValueError: the kernel that the config names does not support the model, the data or the devices.
        """
        c = self.config
        chosen = choice(self.decoder, Backend(c.attn_implementation, mesh), jnp.dtype(c.dtype), c.packing)
        if chosen.kernel == "cudnn" and "activations" in c.offload and "attention" in kept(self.remat):
            raise ValueError(
                "remat has attention and offload activations, but what cuDNN's attention keeps cannot be offloaded; "
                "take attention out of remat, and it is computed again"
            )
        return chosen

    def configure(self, model: Decoder) -> None:
        """Set the config's choices of computation on the model."""
        c = self.config
        model.dtype, model.remat, model.offload = jnp.dtype(c.dtype), self.remat, "activations" in c.offload
        model.scan_layers, model.attn_implementation = c.scan_layers, c.attn_implementation

    def describe(self, source: Source | None = None) -> Decoder:
        """The model with its adapter, if any, without memory for arrays.

        Args:
            source: where the base comes from, to check the adapter to go on from; without it there is no check.

        Raises:
            ValueError: the adapter's targets match nothing, or the adapter to go on from does not fit.
        """
        c = self.config
        model = describe_model(self.decoder, self.storage, self.quantization)
        if c.adapter == "none":
            return model
        if c.adapter_name_or_path is None:
            adapted = jax.eval_shape(lambda base: attach(base, self.lora, jax.random.key(0)), model)
        else:
            from jaxft.hub.peft import load_adapter  # imports the libraries of the hub, which nothing else here needs

            model.source = source
            adapted = jax.eval_shape(lambda base: load_adapter(base, c.adapter_name_or_path), model)
        head = adapted.lm_head
        if head is not None and head.adapter is not None and head.adapter.spec.dropout:
            raise ValueError("lora_dropout is not applied to lm_head; set it to 0, or target other modules")
        return adapted
