"""The architecture of a decoder, as data.

A family (Llama, Qwen, ...) is one choice of values in `DecoderConfig`; the decoder itself has no family names in
it. A `LayerSpec` holds what may differ from layer to layer. Layers with the same spec are stacked and scanned:
`layer_groups` turns any sequence of specs into few groups, each a short pattern repeated many times.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base frequency and context-extension method.

    `type` and `parameters` come from Hugging Face's `rope_parameters`
    (default, linear, dynamic, yarn, longrope, llama3); `max_positions` is `max_position_embeddings`. The first `dim`
    dimensions of a head are rotated in pairs: i and i + dim/2, or 2i and 2i + 1 if `interleaved`.
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
        per_token: experts that see each token.
        intermediate_size: of each expert.
        normalized: the shares of the chosen experts add up to one.
        router_bias, bias: whether the router, and the experts' projections, have a bias.
        shared_size: intermediate size of an expert that sees every token, weighted by its own gate.
        clamp: the gate that replaces the activation.
        fused: the checkpoint stores all experts of a layer in one tensor, where rows of gate and up alternate;
            otherwise each expert has its own tensors.
        transposed: the checkpoint stores the experts' projections as [..., in, out].
        adapters: the option of PEFT's `LoraConfig` that puts adapters on experts; None: no option works.
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
    """Where a model was read from: what is needed to write it out again, and to notice when it changed.

    Attributes:
        name: a hub id or a path, as the user gave it.
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
        rope: which of the config's rotary embeddings it uses, if any.
        sparse: its feed-forward is a mixture of experts.
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
        norm: rms; rms_offset, whose weight is stored minus one; layer, which subtracts the mean; layer_bias, the same
            with a bias.
        block_norms: where a layer has norms, and their names.
        parallel: attention and feed-forward both read the layer's input; a feed-forward without its own norm reads the
            output of attention's norm.
        qk_norm: queries and keys are normalised, each head by itself or the whole projection at once.
        fused_qkv: one projection gives queries, keys and values: first all queries, then keys, then values; or head by
            head.
        fused_gate_up: one projection gives gate and up.
        gated_mlp: down(act(gate(x)) * up(x)), else down(act(up(x))).
        attention_scale: factor on scores; 1/√head_dim when absent.
        attention_sinks: each head has a learned score that takes part in the softmax but has no value.
        attention_softcap, logits_softcap: c tanh(x / c) of scores and of logits.
        embedding_scale, residual_scale, logits_scale: factors on embeddings, on what a half of a layer adds, on logits.
        local_rope: rotary embedding of the layers whose spec says "local".
        learned_positions: rows of the table of position embeddings, which are added to the token embeddings.
        transposed: the checkpoint stores the layers' projections as [in, out].
        renames: pairs of (our part of a name, Hugging Face's), applied one after the other; * stands for a layer's
            number, % for an expert's.
        experts: the mixture of experts in the layers whose spec is `sparse`.
        part_of: the model_type of the vision model that this model is the text part of.
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
        """The Hugging Face names of a module or parameter, one for each stacked layer, or each expert of each layer.

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
