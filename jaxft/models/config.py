"""What a decoder is made of, as data.

A family (Llama, Qwen, ...) is a point in the space spanned by `DecoderConfig`; the decoder itself has no
family names in it. What may differ from layer to layer is a `LayerSpec`. Layers with the same spec are stacked
and scanned: `layer_groups` turns any sequence of specs into few groups, each a short pattern repeated many times.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base frequency and context-extension method.

    `type` and `parameters` are those of Hugging Face's `rope_parameters`
    (default, linear, dynamic, yarn, longrope, llama3); `max_positions` is `max_position_embeddings`. The first `dim`
    dimensions of a head are rotated; a pair is i and i + dim/2, or 2i and 2i + 1 where `interleaved`.
    """

    theta: float
    dim: int
    max_positions: int
    type: str = "default"
    parameters: tuple[tuple[str, object], ...] = ()
    interleaved: bool = False


@dataclass(frozen=True)
class BlockNorms:
    """Names of the norms around the two halves of a layer; None: no norm there."""

    attention_in: str | None = "input_layernorm"
    attention_out: str | None = None
    mlp_in: str | None = "post_attention_layernorm"
    mlp_out: str | None = None


@dataclass(frozen=True)
class Clamp:
    """The gate of gpt-oss: gate * sigmoid(alpha gate) * (up + 1), where |up| and gate are at most `limit`."""

    alpha: float
    limit: float


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the feed-forward: a router chooses a few for each token.

    Attributes:
        count: experts of a layer.
        per_token: how many of them see a token.
        intermediate_size: of each.
        normalized: the shares of those chosen add up to one.
        router_bias, bias: of the router and of the experts' projections.
        shared_size: intermediate size of an expert that sees every token, weighted by a gate of its own.
        clamp: in place of the activation.
        fused: the checkpoint keeps all experts of a layer in one tensor, gate and up row by row in turn; else each
            expert has its own tensors.
        transposed: their projections are [..., in, out] there.
        adapters: the option of PEFT's `LoraConfig` that puts adapters on them; None: there is none that works.
    """

    count: int
    per_token: int
    intermediate_size: int
    normalized: bool = True
    router_bias: bool = False
    bias: bool = False
    shared_size: int | None = None
    clamp: Clamp | None = None
    fused: bool = False
    transposed: bool = False
    adapters: Literal["target_modules", "target_parameters"] | None = "target_modules"


@dataclass(frozen=True)
class Source:
    """The directory a model was read from: what is needed to write it out again, and to notice when it changed.

    Attributes:
        name: as the user gave it: a hub id or a path.
        path: the directory, or the GGUF file.
        revision: the commit it was downloaded at, for a hub id.
        fingerprint: identifies the weights (`jaxft.hub.load.fingerprint`).
    """

    name: str
    path: str
    revision: str | None
    fingerprint: str


@dataclass(frozen=True)
class LayerSpec:
    """What may differ between layers.

    Attributes:
        window: a query sees the last `window` keys, itself included.
        rope: which of the config's rotary embeddings, or none.
        sparse: a mixture of experts is its feed-forward.
    """

    window: int | None = None
    rope: Literal["global", "local"] | None = "global"
    sparse: bool = False


@dataclass(frozen=True)
class LayerGroup:
    """Layers `start .. start + len(pattern) * repeats`: the pattern, repeated."""

    start: int
    pattern: tuple[LayerSpec, ...]
    repeats: int

    def layers_at(self, position: int) -> range:
        """Indices in the model of the layers stacked at a position of the pattern."""
        period = len(self.pattern)
        return range(self.start + position, self.start + period * self.repeats, period)


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder-only transformer. Names follow Hugging Face where they agree.

    Attributes:
        norm: rms; rms_offset, whose weight is stored less one; or layer, which subtracts the mean, with a bias or not.
        block_norms: where a layer has norms, and what they are called.
        parallel: attention and feed-forward both start from the layer's input; without a norm of its own the
            feed-forward starts from attention's.
        qk_norm: queries and keys are normalised, each head by itself or the whole projection at once.
        fused_qkv: one projection gives queries, keys and values: all of each in turn, or head by head.
        fused_gate_up: one projection gives the gate and what it gates.
        gated_mlp: down(act(gate(x)) * up(x)), else down(act(up(x))).
        attention_scale: of scores; 1/√head_dim when absent.
        attention_sinks: each head has a learned score that takes its share of the softmax and has no value.
        attention_softcap, logits_softcap: c tanh(x / c) of scores and of logits.
        embedding_scale, residual_scale, logits_scale: factors on embeddings, on what a half of a layer adds, on logits.
        local_rope: of the layers whose spec asks for it.
        learned_positions: rows of a table that is added to the embeddings, by position.
        transposed: the checkpoint stores the layers' projections [in, out].
        renames: (ours, Hugging Face's) parts of names, applied one after the other; * stands for a layer's number, %
            for an expert's.
        experts: of the layers whose spec asks for them.
        part_of: the model_type of the model with vision, of which this is the part for text.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    rope: Rope
    norm_eps: float
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "projection"] | None = None
    tie_word_embeddings: bool = False
    norm: Literal["rms", "rms_offset", "layer", "layer_bias"] = "rms"
    block_norms: BlockNorms = BlockNorms()
    parallel: bool = False
    fused_qkv: Literal["in turn", "by head"] | None = None
    fused_gate_up: bool = False
    gated_mlp: bool = True
    attention_scale: float | None = None
    attention_sinks: bool = False
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    local_rope: Rope | None = None
    learned_positions: int | None = None
    transposed: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    experts: Experts | None = None
    part_of: str | None = None

    def names(self, name: str, layers: range | None, experts: int | None = None) -> tuple[str, ...]:
        """The Hugging Face names of a module or parameter, one for each layer it stacks, or for each expert of each.

        `model.layers.self_attn.q_proj` of layers 0 and 2 is `model.layers.0.self_attn.q_proj` and
        `model.layers.2.self_attn.q_proj`, unless `renames` say otherwise.
        """
        if layers is not None:
            name = name.replace("model.layers.", "model.layers.*.", 1)
        if experts is not None:
            name = name.replace(".experts.", ".experts.%.", 1)
        for ours, theirs in self.renames:
            name = name.replace(ours, theirs)
        if self.part_of is not None and name.startswith("model."):
            name = "model.language_model." + name.removeprefix("model.")
        by_layer = [name] if layers is None else [name.replace("*", str(layer)) for layer in layers]
        if experts is None:
            return tuple(by_layer)
        return tuple(name.replace("%", str(expert)) for name in by_layer for expert in range(experts))

    @cached_property
    def groups(self) -> tuple[LayerGroup, ...]:
        return layer_groups(self.layers)


def layer_groups(layers: tuple[LayerSpec, ...]) -> tuple[LayerGroup, ...]:
    """Cover the layers with repeated patterns, each time taking the pattern that covers most, shortest first.

    >>> a, b = LayerSpec(), LayerSpec(window=4)
    >>> [(g.start, len(g.pattern), g.repeats) for g in layer_groups((a, a, b, a, a, b, a))]
    [(0, 3, 2), (6, 1, 1)]
    """
    groups, start = [], 0
    while start < len(layers):
        best_period, best_repeats = 1, 1
        for period in range(1, (len(layers) - start) // 2 + 1):
            pattern = layers[start : start + period]
            repeats = 1
            while layers[start + repeats * period : start + (repeats + 1) * period] == pattern:
                repeats += 1
            if repeats > 1 and period * repeats > best_period * best_repeats:
                best_period, best_repeats = period, repeats
        groups.append(LayerGroup(start, layers[start : start + best_period], best_repeats))
        start += best_period * best_repeats
    return tuple(groups)
