"""The decoder: every supported family is this module with another `DecoderConfig`.

Its tree has Hugging Face's names (`model.layers.self_attn.q_proj.weight`), with one difference: layers
that share a spec are stacked on a leading axis and scanned, so compile time does not grow with depth.
`model.layers[g][p]` holds the layers at position p of the pattern of group g (see `layer_groups`).

Axes: B batch, T tokens, S cache slots, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from jaxft.models import keys
from jaxft.models.attention import LayerCache, Setting
from jaxft.models.blockwise import Reach
from jaxft.models.config import DecoderConfig, LayerSpec, Source
from jaxft.models.embedding import Embedding
from jaxft.models.experts import Balance
from jaxft.models.head import Arrays, Head, pieces
from jaxft.models.kernels import Backend, Implementation
from jaxft.models.layer import Layer, norm
from jaxft.models.linear import Linear, Weight
from jaxft.models.parameter import Parameter, declared
from jaxft.models.remat import Remat, rematerialised
from jaxft.models.rope import rotary_angles
from jaxft.quantization.qtensor import Format, quantize
from jaxft.sharding.mesh import row_sharding

Make = Callable[[Parameter], Weight]
"""Gives the value of a declared parameter: reads it, draws it, or only describes its shape."""


class Cache(NamedTuple):
    """Keys and values of all layers, stacked like the layers themselves, for rows of up to S tokens."""

    layers: list[list[LayerCache]]  # [group][position], [repeats, B, S, K, H] each
    segments: jax.Array  # [B, S] int32; -1 where nothing has been written
    length: jax.Array  # tokens written, int32 scalar


class Body(nnx.Module):
    """What Hugging Face calls `model`: embedding, stacked layers, final norm."""

    def __init__(self, config: DecoderConfig, make: Make):
        self.embed_tokens = Embedding(
            make(declared(config, "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)))
        )
        self.embed_positions = nnx.data(None)
        if config.learned_positions is not None:
            shape = (config.learned_positions, config.hidden_size)
            self.embed_positions = nnx.data(Embedding(make(declared(config, "model.embed_positions.weight", shape))))

        def layer(spec: LayerSpec, layers: range) -> Layer:
            def inside(name: str, *shape: int) -> Weight:
                return make(declared(config, f"model.layers.{name}", shape, layers))

            return Layer(config, spec, inside)

        self.layers = nnx.List(
            nnx.List(layer(spec, group.layers_at(position)) for position, spec in enumerate(group.pattern))
            for group in config.groups
        )

        def outside(name: str, *shape: int) -> Weight:
            return make(declared(config, f"model.{name}", shape))

        self.norm = norm(config, outside, "norm", config.hidden_size)


class Decoder(nnx.Module):
    """A causal language model.

    Args:
        config: what it is made of.
        make: gives the value of each declared parameter.
        dtype: of activations; parameters are cast to it where they are used.
        remat: what the backward pass recomputes: `none` keeps everything, `full` keeps layer inputs only, `dots`
            keeps the results of matmuls, a list keeps the activations that it names (see `jaxft.models.remat`).
        scan_layers: compile one layer and loop over the stack; else compile every layer, which takes longer for deeper
            models, but saves copying what the backward pass needs into and out of the stack.
        attn_implementation: the kernel of attention, by name or `auto`; see `jaxft.models.kernels`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        make: Make,
        dtype: jnp.dtype,
        remat: Remat = "none",
        scan_layers: bool = True,
        attn_implementation: Implementation = "auto",
    ):
        self.model = Body(config, make)
        head = declared(config, "lm_head.weight", (config.vocab_size, config.hidden_size))
        self.lm_head = nnx.data(None if config.tie_word_embeddings else Linear(make(head)))
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = remat
        self.offload = False  # whether kept activations wait in host memory
        self.scan_layers = scan_layers
        self.attn_implementation = attn_implementation
        self.activations: NamedSharding | None = None
        self.source: Source | None = None

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [B, T, V] float32 for tokens [B, T] int32; the arguments are those of `hidden`."""
        return self.unembed(self.hidden(tokens, positions, segments, key))

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Final hidden states [B, T, D], normalised.

        Args:
            tokens: [B, T] int32.
            positions: [B, T] int32 for rotary embedding; 0, 1, 2, ... when absent.
            segments: [B, T] int32: tokens see their own segment only; 0 is padding. One segment when absent.
            key: turns on adapter dropout.
        """
        return self.hidden_and_balance(tokens, positions, segments, key)[0]

    def hidden_and_balance(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        key: jax.Array | None = None,
        packed: bool = True,
    ) -> tuple[jax.Array, list[Balance]]:
        """The result of `hidden`, and the `Balance` of each stack of layers that has routers.

        With `packed=False`, the caller guarantees that each row holds one segment, from its first slot on, and then
        padding. Causality then hides the padding from the segment, so attention needs no segments, which some kernels
        do not have. The results at padding have no meaning.
        """
        seen = segments if packed else None
        h, _, balances = self._run(tokens, positions, segments, Reach(jnp.int32(0), seen, seen), None, key)
        return h, balances

    def extend(
        self, cache: Cache, tokens: jax.Array, positions: jax.Array, segments: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Write the next tokens [B, T] into the cache. Gives their final hidden states [B, T, D] and the new cache."""
        written = jax.lax.dynamic_update_slice(cache.segments, segments, (jnp.int32(0), cache.length))
        h, layers, _ = self._run(
            tokens, positions, segments, Reach(cache.length, segments, written), cache.layers, None
        )
        return h, Cache(layers, written, cache.length + tokens.shape[1])

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Room for `length` tokens in each of `batch` rows."""
        c = self.config

        def stack(repeats: int) -> LayerCache:
            shape = (repeats, batch, length, c.num_kv_heads, c.head_dim)
            return LayerCache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))

        layers = [[stack(group.repeats) for _ in group.pattern] for group in c.groups]
        return Cache(layers, jnp.full((batch, length), -1, jnp.int32), jnp.int32(0))

    @property
    def head(self) -> Linear | Embedding:
        """The module that turns hidden states into logits; the embedding itself if the two are tied."""
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    def unembed(self, h: jax.Array) -> jax.Array:
        """Logits [..., V] float32 of hidden states [..., D]."""
        return project(self.config, self.head, h)

    def head_pieces(self, trained_type: type[nnx.Variable]) -> tuple[Head, Arrays, Arrays]:
        """The output head as the loss takes it: a `Head`, its trained arrays and its frozen arrays."""
        return pieces(self.head, partial(project, self.config), trained_type)

    @property
    def backend(self) -> Backend:
        """How attention is computed, and where."""
        return Backend(self.attn_implementation, None if self.activations is None else self.activations.mesh)

    def _run(self, tokens, positions, segments, reach, caches, key):
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        c = self.config
        used = {spec.rope for spec in c.layers}
        ropes = {"global": c.rope, "local": c.local_rope}
        angles = {name: rotary_angles(rope, positions) for name, rope in ropes.items() if name in used}
        setting = Setting(angles, reach, segments, self.backend)
        h = self.model.embed_tokens(tokens, self.dtype)
        h = h * jnp.asarray(c.embedding_scale, self.dtype)
        if c.learned_positions is not None:
            h = h + self.model.embed_positions(positions, self.dtype)
        h = self._constrained(h)
        new_caches, balances = [], []
        for index, (group, stacks) in enumerate(zip(self.config.groups, self.model.layers, strict=True)):

            def pattern(h, per_repeat):
                layers, layer_caches, layer_key = per_repeat
                new, routed = [], []
                for position, layer in enumerate(layers):
                    drop = None if layer_key is None else keys.fold_in(layer_key, position)
                    layer_cache = None if layer_caches is None else layer_caches[position]
                    h, layer_cache, balance = layer(h, setting, layer_cache, drop)
                    h = self._constrained(h)
                    new.append(layer_cache)
                    routed.append(balance)
                return h, (new, routed)

            drops = None if key is None else keys.split(keys.fold_in(key, index), group.repeats)
            cache = None if caches is None else caches[index]
            body = rematerialised(pattern, self.remat, self.offload, self.scan_layers)
            h, (new, routed) = jax.lax.scan(body, h, (list(stacks), cache, drops), unroll=not self.scan_layers)
            new_caches.append(new)
            balances += [balance for balance in routed if balance is not None]
        return self.model.norm(h), new_caches, balances

    def _constrained(self, h: jax.Array) -> jax.Array:
        """h [B, T, D] as cut between layers: tokens over `context`, or not if they do not divide, as in generation."""
        if self.activations is None:
            return h
        mesh = self.activations.mesh
        cut = self.activations if h.shape[1] % mesh.shape["context"] == 0 else row_sharding(mesh)
        return jax.lax.with_sharding_constraint(h, cut)


def project(config: DecoderConfig, head: Linear | Embedding, h: jax.Array) -> jax.Array:
    """Logits [..., V] float32 of hidden states [..., D]."""
    out_dtype = jnp.dtype("float32")
    logits = head(h, out_dtype=out_dtype) if isinstance(head, Linear) else head.product(h, out_dtype)
    logits = logits if config.logits_scale == 1 else logits * config.logits_scale
    cap = config.logits_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def describe(config: DecoderConfig, make: Make | None = None) -> Decoder:
    """The model without arrays: every parameter is what `make` gives under `jax.eval_shape`, float32 by default."""
    make = make or (lambda parameter: jnp.zeros(parameter.stacked_shape, jnp.float32))
    return Decoder(config, lambda parameter: jax.eval_shape(lambda: make(parameter)), jnp.float32)


def describe_model(config: DecoderConfig, dtype: str, form: Format | None) -> Decoder:
    """The model that `load_model` would give, with `jax.ShapeDtypeStruct`s in place of arrays."""

    def make(parameter: Parameter) -> Weight:
        value = jnp.zeros(parameter.stacked_shape, jnp.dtype(dtype))
        return quantize(value, form) if form and is_quantized(parameter) else value

    return describe(config, make)


def is_quantized(parameter: Parameter) -> bool:
    """Only weights of matmuls inside the layers are quantized; embedding, output head, norms and biases are not."""
    return parameter.name.endswith("_proj.weight")


def initialize(config: DecoderConfig, key: jax.Array, dtype: jnp.dtype = jnp.float32, scale: float = 0.02) -> Decoder:
    """A model to train from scratch: weights drawn from N(0, scale²), biases zero, norms one. float32 storage."""

    def draw(parameter: Parameter) -> jax.Array:
        nonlocal key
        shape = parameter.stacked_shape
        if parameter.name.endswith(("bias", "sinks")):
            return jnp.zeros(shape, jnp.float32)
        if len(parameter.shape) == 1:
            return jnp.full(shape, 0.0 if config.norm == "rms_offset" else 1.0, jnp.float32)
        key, subkey = jax.random.split(key)
        return scale * jax.random.normal(subkey, shape, jnp.float32)

    return Decoder(config, draw, dtype)


def modules(model: Decoder) -> Iterator[tuple[str, range | None, nnx.Module]]:
    """Every module with its name, without layer numbers, and the layers it stacks (None: not stacked)."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module) and path:
            yield *_locate(model, path), node


def parameters(model: Decoder) -> Iterator[tuple[Parameter, nnx.Param]]:
    """Every parameter of the base with its declaration; adapters are not among them."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Param):
            name, layers = _locate(model, path)
            shape = node.get_value().shape
            yield declared(model.config, name, shape if layers is None else shape[1:], layers), node


def _locate(model: Decoder, path: tuple) -> tuple[str, range | None]:
    name = ".".join(part for part in path if isinstance(part, str))
    if path[:2] != ("model", "layers") or len(path) < 4:
        return name, None
    return name, model.config.groups[path[2]].layers_at(path[3])
