"""Read a Hugging Face model directory into a `Decoder`, strictly: config, tensors and model must agree.

The weights themselves come by `stream`, a few tensors at a time.
"""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.hub.encoded import Files
from jaxft.hub.kept import say, tell
from jaxft.hub.model_files import companions_of, config_file, open_files, open_weights, read_config, read_json
from jaxft.hub.prequantized import Prequantized, Weights
from jaxft.hub.resolve import ResolvedModel, resolve_model
from jaxft.hub.stack import Storage
from jaxft.hub.stream import load_weights
from jaxft.models.config import DecoderConfig, Source
from jaxft.models.decoder import Decoder, Remat, describe, is_quantized, parameters
from jaxft.models.hf_config import decoder_config
from jaxft.models.kernels import Implementation
from jaxft.models.placement import bind, check_mesh
from jaxft.quantization.formats import parse_format
from jaxft.quantization.qtensor import Format

IGNORED = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
"""Endings of tensors that old checkpoints carry and that are derived from the config."""

BOOKKEEPING = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}
"""Keys of config.json that say nothing about what the model computes."""

VALUES = ("float64", "float32", "bfloat16", "float16")
"""Dtypes of tensors that hold the values themselves."""

DTYPES = ("float32", "bfloat16")
"""What weights may be stored in, and computed with."""

SAMPLE = 1024  # values


def load_model(
    path: str | Path,
    dtype: str = "float32",
    quantization: str | Format | None = None,
    mesh: Mesh | None = None,
    *,
    revision: str | None = None,
    resolved: ResolvedModel | None = None,
    remat: Remat = "none",
    scan_layers: bool = True,
    attn_implementation: Implementation = "auto",
) -> Decoder:
    """A Hugging Face model, ready to run: `model(tokens[B, T] int32) -> logits[B, T, V] float32`.

    Args:
        path: a model directory, a GGUF file or a hub id.
        dtype: of stored weights and of activations, float32 or bfloat16.
        quantization: int8, int4 or nf4 for the linear layers except the output head; None keeps `dtype`. A
            checkpoint that is already so quantized keeps its codes, any other is dequantized first
            (`jaxft.hub.prequantized`, `jaxft.hub.kept`).
        mesh: devices to shard over, with axes data, fsdp, expert, context, tensor (`jaxft.sharding.mesh.make_mesh`).
        revision: branch, tag or commit of a hub id.
        resolved: what `path` was found to be; None: it is looked up. A branch may move between two looks.
        remat, scan_layers, attn_implementation: see `Decoder`.

    Raises:
        ValueError: another dtype; or the directory, its config or its tensors are not what they should be.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; weights are stored in {' or '.join(DTYPES)} (or see `quantization`)")
    resolved = resolved or resolve_model(str(path), revision)
    config, checkpoint = open_model(resolved.path)
    if mesh is not None:
        check_mesh(config, mesh)
    storage = jnp.dtype(dtype)
    form = parse_format(quantization) if isinstance(quantization, str) else quantization
    announce(config, checkpoint, form, dtype)

    storages = {
        parameter: Storage.of(parameter, storage, form if is_quantized(parameter) else None, mesh)
        for parameter, _ in parameters(describe(config))
    }
    make = load_weights(checkpoint, storages).__getitem__
    model = Decoder(config, make, storage, remat, scan_layers, attn_implementation)
    identity = fingerprint(open_files(resolved.path))
    model.source = Source(str(path), os.path.abspath(resolved.path), resolved.revision, identity)
    if mesh is not None:
        bind(model, mesh)
    return model


def open_model(path: Path) -> tuple[DecoderConfig, Weights]:
    """The decoder that a directory or GGUF file describes, and its weights, which fit.

    Where the config says that output head and embedding are one, and the files have a head of other values, they are
    two, as in transformers: configs leave the key out, and defaults have changed.

    Raises:
        ValueError: config or weights cannot be read, or do not agree.
    """
    raw = read_config(path)
    config, weights = decoder_config(raw), open_weights(path, raw)
    (head,), (embedding,) = (config.names(f"{name}.weight", None) for name in ("lm_head", "model.embed_tokens"))
    both = config.tie_word_embeddings and {head, embedding} <= set(weights.names())
    if both and not _same(weights, head, embedding):
        config = replace(config, tie_word_embeddings=False)
    check_tensors(weights, config)
    return config, weights


def _same(weights: Weights, one: str, other: str) -> bool:
    rows = weights.info(one).shape[0]
    if weights.info(one).shape != weights.info(other).shape:
        return False
    for start in range(0, rows, SAMPLE):
        part = (slice(start, start + SAMPLE),)
        if not np.array_equal(weights.read(one, part), weights.read(other, part)):
            return False
        weights.release(one)
        weights.release(other)
    return True


def announce(config: DecoderConfig, weights: Weights, form: Format | None, dtype: str) -> None:
    """Log, once, which weights change their format on loading."""
    if config.part_of is not None:
        say(f"{weights.directory}: of this {config.part_of} model only the part for text is loaded")
    inside = [parameter for parameter, _ in parameters(describe(config)) if is_quantized(parameter)]
    tell(weights, form, dtype, [name for parameter in inside for name in parameter.names])


def check_tensors(checkpoint: Weights, config: DecoderConfig) -> None:
    """Every tensor of the file is a parameter of the model, and the reverse, with the same shape."""
    expected = {name: p.stored_shape for p, _ in parameters(describe(config)) for name in p.names}
    tied = config.names("lm_head.weight", None) if config.tie_word_embeddings else ()
    found = {
        name: checkpoint.info(name).shape
        for name in checkpoint.names()
        if not name.endswith(IGNORED) and name not in tied
    }
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    unknown = [name for name in unknown if not _is_idle_bias(checkpoint, name)]
    coded = [
        f"{name} ({checkpoint.info(name).dtype})"
        for name in sorted(expected.keys() & found.keys())
        if checkpoint.info(name).dtype.name not in VALUES
    ]
    misshapen = [
        f"{name} is {found[name]}, expected {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name]) != expected[name]
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
        for kind, names in (
            ("missing from the files", missing),
            ("unknown to the model", unknown),
            ("of another shape", misshapen),
            ("no values but codes, and config.json has no quantization_config that says of what", coded),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{checkpoint.directory}: tensors do not fit config.json; " + "; ".join(problems))


def _is_idle_bias(weights: Weights, name: str) -> bool:
    """Whether it is one of the zeros that quantizers put beside every weight, for models that have no bias there."""
    weight = f"{name.removesuffix('.bias')}.weight"
    if not name.endswith(".bias") or not isinstance(weights, Prequantized) or weight not in weights.encoded:
        return False
    return not weights.read(name).any()


def eos_token_ids(model: Path, tokenizer_eos: int | None) -> list[int]:
    """Tokens that end a text: those of generation_config.json, else of the model's config, and the tokenizer's own.

    Raises:
        ValueError: a file is damaged, or its `eos_token_id` is neither a token id nor a list of them.
    """
    found = {tokenizer_eos}
    for path in (companions_of(model) / "generation_config.json", config_file(model)):
        read = read_config if path == model else read_json
        declared = read(path).get("eos_token_id") if path.exists() else None
        if declared is not None:
            ids = declared if isinstance(declared, list) else [declared]
            if not all(type(token) is int for token in ids):
                raise ValueError(f"{path}: eos_token_id must be a token id or a list of them, not {declared!r}")
            found |= set(ids)
            break
    return sorted(found - {None})


def config_fingerprint(model: Path) -> str:
    """Identifies what a model's config says of the computation, not who wrote it."""
    config = {key: value for key, value in read_config(model).items() if key not in BOOKKEEPING}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def fingerprint(checkpoint: Files) -> str:
    """Identifies the weights without reading all of them: three samples from each tensor, its start, middle and end.

    Of a quantized checkpoint these are the tensors as they are stored: its codes, scales and the rest.
    The same values in a wider dtype are the same weights.
    """
    digest = hashlib.sha256()
    for name in sorted(checkpoint.names()):
        digest.update(f"{name} {checkpoint.info(name).shape}".encode())
        flat = checkpoint.read(name).reshape(-1)
        middle = flat.size // 2
        for part in (flat[:SAMPLE], flat[middle : middle + SAMPLE], flat[-SAMPLE:]):
            digest.update(part.astype("float32").tobytes())
        checkpoint.release(name)
    return digest.hexdigest()
