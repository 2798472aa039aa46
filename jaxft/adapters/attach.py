"""Put adapters on a model and take them off. The given model does not change; arrays are shared."""

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.adapters.lora import LoRA, LoraSpec, row_squares
from jaxft.adapters.targets import LoraConfig, summary
from jaxft.models.decoder import Decoder, modules
from jaxft.models.embedding import Embedding
from jaxft.models.experts import ExpertLinear
from jaxft.models.linear import Linear
from jaxft.models.norms import Norm
from jaxft.sharding.arrays import on_host, place


class Site(NamedTuple):
    """A linear layer, or a stack of them, and the Hugging Face modules it stands for.

    Attributes:
        modules: one name for each entry of the stack, by layer, then by expert. If the experts of a layer are one
            tensor, the names of these parameters.
        stack: leading axes of the weight along which the modules are stacked.
        target: which option of a `LoraConfig` selects it; None: PEFT has no adapters for it.
    """

    linear: Linear | ExpertLinear
    modules: tuple[str, ...]
    stack: tuple[int, ...]
    target: Literal["target_modules", "target_parameters"] | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one module's weight: [out, in], or [experts, out, in]."""
        return self.linear.weight.get_value().shape[len(self.stack) :]


class Factors(NamedTuple):
    """The trained arrays of one module: A [r, in], B [out, r], magnitude [out] with DoRA. If experts are one tensor:
    A [experts, r, in] and B [experts, out, r].
    """

    A: np.ndarray
    B: np.ndarray
    magnitude: np.ndarray | None = None


def sites(model: Decoder) -> Iterator[Site]:
    """Every linear layer of the model."""
    experts = model.config.experts
    for name, layers, module in modules(model):
        stack = () if layers is None else (len(layers),)
        if isinstance(module, Linear):
            # If PEFT finds experts by the names of their modules, it mistakes a dense feed-forward for an expert.
            shadowed = ".mlp." in name and experts is not None and experts.adapters == "target_modules"
            yield Site(module, model.config.names(name, layers), stack, None if shadowed else "target_modules")
        elif isinstance(module, ExpertLinear):
            each = None if experts.fused else experts.count
            yield Site(
                module,
                model.config.names(name, layers, each),
                stack if each is None else (*stack, each),
                experts.adapters,
            )


def targets_of(model: Decoder, config: LoraConfig) -> set[str]:
    """The modules that get an adapter.

    Raises:
        ValueError: the targets match nothing (see `LoraConfig.select`).
    """
    by_option = {"target_modules": [], "target_parameters": [], None: []}
    for site in sites(model):
        by_option[site.target] += site.modules
    return set(config.select(by_option["target_modules"], by_option["target_parameters"]))


def attach(model: Decoder, config: LoraConfig, key: jax.Array) -> Decoder:
    """The model with fresh adapters: A uniform in ±1/√in (Kaiming, a = √5), B zero, so that nothing changes yet.

    Raises:
        ValueError: as `targets_of` and `check_experts` do; or a regular expression matches a module that gets no
            adapter, such as an output head tied to the embedding; or the model has adapters already.
    """
    model = _copy(model)
    chosen = targets_of(model, config)
    _refuse_others(model, config)
    for index, site in enumerate(sites(model)):
        spec = _spec(site, config, chosen)
        if spec is None:
            continue
        *lead, out_features, in_features = site.linear.weight.get_value().shape
        bound = in_features**-0.5
        draw = jax.random.uniform(
            jax.random.fold_in(key, index),
            (*lead, spec.max_rank, in_features),
            jnp.float32,
            minval=-bound,
            maxval=bound,
        )
        in_use = jnp.arange(spec.max_rank) < _spread(site, spec.ranks)[..., None]
        A = jnp.where(in_use[..., None], draw, 0)
        B = jnp.zeros((*lead, out_features, spec.max_rank), jnp.float32)
        _install(site, spec, A, B, None)
    check_experts(model)
    return model


def _refuse_others(model: Decoder, config: LoraConfig) -> None:
    """A regular expression may match linear layers only: PEFT refuses norms, and would adapt an embedding."""
    if not isinstance(config.target_modules, str) or config.target_modules == "all-linear":
        return
    (head,) = model.config.names("lm_head", None)
    tied = model.lm_head is None and config.chooses(head)
    if others := [name for name in _without_adapter(model) if config.chooses(name)] + [head] * tied:
        why = f" ({head} is the embedding of this model)" if tied else ""
        endings = dict.fromkeys(re.escape(name.rpartition(".")[2]) for name in others)
        raise ValueError(
            f"target_modules {config.target_modules!r} matches what gets no adapter: {summary(others)}{why}; leave it "
            f"out of the expression: (?!(?:.*\\.)?(?:{'|'.join(endings)})$)(?:{config.target_modules})"
        )


def _without_adapter(model: Decoder) -> Iterator[str]:
    """Names of the modules that have weights but are not linear layers."""
    for name, layers, module in modules(model):
        if isinstance(module, Embedding | Norm):
            yield from model.config.names(name, layers)


def attach_factors(model: Decoder, config: LoraConfig, factors: dict[str, Factors]) -> Decoder:
    """The model with the given adapters, one entry for each module that `config` selects."""
    model = _copy(model)
    for site in sites(model):
        spec = _spec(site, config, set(factors))
        if spec is None:
            continue
        *experts, out_features, in_features = site.shape
        count = len(site.modules)
        A = np.zeros((count, *experts, spec.max_rank, in_features), np.float32)
        B = np.zeros((count, *experts, out_features, spec.max_rank), np.float32)
        magnitude = np.ones((count, out_features), np.float32) if spec.use_dora else None
        for index, name in enumerate(site.modules):
            if name in factors:
                rank = spec.ranks[index]
                A[index, ..., :rank, :], B[index, ..., :rank] = factors[name].A, factors[name].B
                if spec.use_dora:
                    magnitude[index] = factors[name].magnitude
        A, B, magnitude = (
            None if part is None else jnp.asarray(part.reshape(*site.stack, *part.shape[1:]))
            for part in (A, B, magnitude)
        )
        _install(site, spec, A, B, magnitude)
    return model


def check_experts(model: Decoder) -> None:
    """Refuse adapters on experts that PEFT would not load, or would load with another effect.

    Raises:
        ValueError: there are such adapters; the message says which, and what to do.
    """
    experts = [site for site in sites(model) if isinstance(site.linear, ExpertLinear)]
    adapters = [site.linear.adapter for site in experts]
    if model.config.experts is None or model.config.experts.fused or not any(adapters):
        return
    if any(lora is not None and lora.spec.use_rslora for lora in adapters):
        raise ValueError(
            f"use_rslora is set, but PEFT fuses gate and up of experts ({experts[0].modules[0]}) to twice the rank and "
            "would scale them wrongly; set lora_alpha to alpha * sqrt(r) instead"
        )
    for site, lora in zip(experts, adapters, strict=True):
        for index, module in enumerate(site.modules):
            if lora is None or not lora.spec.ranks[index]:
                raise ValueError(
                    "adapters on experts sit on gate, up and down of all experts in all layers, or on none: PEFT fuses "
                    f"them; {module} has none"
                )
    if len({pair for lora in adapters for pair in zip(lora.spec.ranks, lora.spec.alphas, strict=True)}) > 1:
        raise ValueError("experts have different ranks or alphas, and PEFT has one for all of them")


def factors_of(model: Decoder) -> dict[str, Factors]:
    """The adapters of a model by Hugging Face module, unpadded, on every host."""
    result = {}
    for site in sites(model):
        lora = site.linear.adapter
        if lora is None:
            continue
        A, B = on_host(lora.A[...]), on_host(lora.B[...])
        magnitude = None if lora.magnitude is None else on_host(lora.magnitude[...])
        indices = np.ndindex(site.stack)
        for index, name, rank in zip(indices, site.modules, lora.spec.ranks, strict=True):
            if rank:
                result[name] = Factors(
                    A[index][..., :rank, :], B[index][..., :rank], None if magnitude is None else magnitude[index]
                )
    return result


def detach(model: Decoder) -> Decoder:
    """The model without adapters."""
    model = _copy(model)
    for site in sites(model):
        site.linear.adapter = nnx.data(None)
    return model


def _copy(model: Decoder) -> Decoder:
    return nnx.merge(*nnx.split(model))


def _spec(site: Site, config: LoraConfig, chosen: set[str]) -> LoraSpec | None:
    ranks = tuple(config.rank(name) if name in chosen else 0 for name in site.modules)
    if not any(ranks):
        return None
    if site.linear.adapter is not None:
        raise ValueError("the model carries an adapter already; merge it first, or load a fresh base")
    if isinstance(site.linear, ExpertLinear) and (config.use_dora or config.lora_dropout):
        option = "use_dora" if config.use_dora else "lora_dropout"
        raise ValueError(
            f"{option} is {getattr(config, option)}, which adapters on experts ({site.modules[0]}) cannot have, here "
            "or in PEFT; leave it out, or leave the experts out of the targets"
        )
    return LoraSpec(
        ranks,
        tuple(float(config.alpha(name)) for name in site.modules),
        config.use_rslora,
        config.use_dora,
        config.lora_dropout,
    )


def _spread(site: Site, values: tuple) -> jax.Array:
    """Values, one for each module, spread to the leading axes of the weight."""
    by_module = jnp.asarray(values).reshape(*site.stack, *(1,) * (len(site.shape) - 2))
    return jnp.broadcast_to(by_module, site.linear.weight.get_value().shape[:-2])


def _install(site: Site, spec: LoraSpec, A: jax.Array, B: jax.Array, magnitude: jax.Array | None) -> None:
    """Put an adapter on the site, cut like the site's weight."""
    linear, squares = site.linear, None
    if spec.use_dora:
        weight = linear.weight.get_value()
        described = isinstance(jax.tree.leaves(weight)[0], jax.ShapeDtypeStruct)  # a model without values
        squares = jax.eval_shape(row_squares, weight) if described else row_squares(weight)
        magnitude = jnp.sqrt(squares) if magnitude is None else magnitude
    scale = _spread(site, jnp.asarray(spec.scales, jnp.float32))
    linear.adapter = LoRA(spec, scale, A, B, magnitude, squares)
    if linear.layout is not None:
        for variable, sharding in linear.adapter.bind(linear.layout):
            variable.set_value(place(variable.get_value(), sharding))
