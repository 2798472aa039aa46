"""Put adapters on a model and take them off. The model given is left as it was; arrays are shared."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxft.adapters.lora import LoRA, LoraSpec, row_squares
from jaxft.adapters.targets import LoraConfig
from jaxft.models.decoder import Decoder, modules
from jaxft.models.linear import Linear
from jaxft.sharding.layout import Layout


class Site(NamedTuple):
    """A linear layer, or a stack of them, and the Hugging Face modules it stands for."""

    linear: Linear
    modules: tuple[str, ...]
    stacked: bool


class Factors(NamedTuple):
    """The trained arrays of one module: A [r, in], B [out, r], magnitude [out] with DoRA."""

    A: np.ndarray
    B: np.ndarray
    magnitude: np.ndarray | None = None


def sites(model: Decoder) -> Iterator[Site]:
    """Every linear layer of the model."""
    for name, layers, module in modules(model):
        if isinstance(module, Linear):
            yield Site(module, model.config.names(name, layers), layers is not None)


def attach(model: Decoder, config: LoraConfig, key: jax.Array) -> Decoder:
    """The model with fresh adapters: A uniform in ±1/√in (Kaiming, a = √5), B zero, so that nothing changes yet.

    Raises:
        ValueError: the targets match nothing (see `LoraConfig.select`), or the model has adapters already.
    """
    model = _copy(model)
    chosen = set(config.select(name for site in sites(model) for name in site.modules))
    for index, site in enumerate(sites(model)):
        spec = _spec(site, config, chosen)
        if spec is None:
            continue
        if site.linear.adapter is not None:
            raise ValueError("the model carries an adapter already; merge it first, or load a fresh base")
        out_features, in_features = site.linear.weight.get_value().shape[-2:]
        bound = in_features**-0.5
        draw = jax.random.uniform(
            jax.random.fold_in(key, index),
            (len(spec.ranks), spec.max_rank, in_features),
            jnp.float32,
            minval=-bound,
            maxval=bound,
        )
        in_use = jnp.arange(spec.max_rank)[None, :] < jnp.asarray(spec.ranks)[:, None]
        A = jnp.where(in_use[..., None], draw, 0)
        B = jnp.zeros((len(spec.ranks), out_features, spec.max_rank), jnp.float32)
        _install(site, spec, A, B, None)
    return model


def attach_factors(model: Decoder, config: LoraConfig, factors: dict[str, Factors]) -> Decoder:
    """The model with the given adapters, one entry for each module that `config` selects."""
    model = _copy(model)
    for site in sites(model):
        spec = _spec(site, config, set(factors))
        if spec is None:
            continue
        if site.linear.adapter is not None:
            raise ValueError("the model carries an adapter already; merge it first, or load a fresh base")
        out_features, in_features = site.linear.weight.get_value().shape[-2:]
        A = np.zeros((len(spec.ranks), spec.max_rank, in_features), np.float32)
        B = np.zeros((len(spec.ranks), out_features, spec.max_rank), np.float32)
        magnitude = np.ones((len(spec.ranks), out_features), np.float32) if spec.use_dora else None
        for layer, name in enumerate(site.modules):
            if name in factors:
                rank = spec.ranks[layer]
                A[layer, :rank], B[layer, :, :rank] = factors[name].A, factors[name].B
                if spec.use_dora:
                    magnitude[layer] = factors[name].magnitude
        _install(site, spec, jnp.asarray(A), jnp.asarray(B), None if magnitude is None else jnp.asarray(magnitude))
    return model


def factors_of(model: Decoder) -> dict[str, Factors]:
    """The adapters of a model by Hugging Face module, unpadded, on the host."""
    result = {}
    for site in sites(model):
        lora = site.linear.adapter
        if lora is None:
            continue
        A, B = np.asarray(lora.A[...]), np.asarray(lora.B[...])
        magnitude = None if lora.magnitude is None else np.asarray(lora.magnitude[...])
        if not site.stacked:
            A, B, magnitude = A[None], B[None], None if magnitude is None else magnitude[None]
        for layer, (name, rank) in enumerate(zip(site.modules, lora.spec.ranks, strict=True)):
            if rank:
                result[name] = Factors(
                    A[layer, :rank], B[layer, :, :rank], None if magnitude is None else magnitude[layer]
                )
    return result


def detach(model: Decoder) -> Decoder:
    """The base alone."""
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
    return LoraSpec(
        ranks,
        tuple(float(config.alpha(name)) for name in site.modules),
        config.use_rslora,
        config.use_dora,
        config.lora_dropout,
    )


def _install(site: Site, spec: LoraSpec, A: jax.Array, B: jax.Array, magnitude: jax.Array | None) -> None:
    """Put arrays with a leading layer axis on the site, cut as its weight is cut."""
    linear, layout = site.linear, site.linear.layout
    squares = None
    if spec.use_dora:
        squares = row_squares(linear.weight.get_value())
        squares = squares if site.stacked else squares[None]
        magnitude = jnp.sqrt(squares) if magnitude is None else magnitude
    layout_A = layout_B = None
    if layout is not None:
        rows, columns = layout.stored
        layout_A, layout_B = Layout(layout.mesh, P(None, columns)), Layout(layout.mesh, P(rows, None))
        A, B = (jax.device_put(array, cut.stacked(cut.stored)) for array, cut in ((A, layout_A), (B, layout_B)))
        if spec.use_dora:
            by_row = layout_B.stacked(P(rows))
            magnitude, squares = jax.device_put(magnitude, by_row), jax.device_put(squares, by_row)
    if not site.stacked:
        A, B = A[0], B[0]
        magnitude, squares = (None, None) if magnitude is None else (magnitude[0], squares[0])
    linear.adapter = LoRA(spec, A, B, magnitude, squares, layout_A, layout_B)
