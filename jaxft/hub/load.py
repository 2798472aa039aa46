"""Read a Hugging Face model directory into a `Decoder`, strictly: config, tensors and model must be of one mind.

The weights themselves come by `stream`, a few tensors at a time.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxft.hub.checkpoint import Checkpoint
from jaxft.hub.resolve import resolve_model
from jaxft.hub.stack import Storage
from jaxft.hub.stream import load_weights
from jaxft.models.config import DecoderConfig, Source
from jaxft.models.decoder import Decoder, Parameter, Remat, describe, parameters
from jaxft.models.families import decoder_config
from jaxft.models.linear import Weight
from jaxft.models.placement import bind, check_mesh
from jaxft.quantization.formats import parse_format
from jaxft.quantization.qtensor import Format, quantize

IGNORED = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
"""Endings of tensors that old checkpoints carry and that are derived from the config."""

BOOKKEEPING = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}
"""Keys of config.json that say nothing about what the model computes."""

DTYPES = ("float32", "bfloat16")
"""What weights may be stored in, and computed with."""

BELONGS_TO = {"config.json": "a model", "adapter_config.json": "a PEFT adapter"}
"""What a directory holds that has such a file."""

SAMPLE = 1024  # values


def load_model(
    path: str | Path,
    dtype: str = "float32",
    quantization: str | Format | None = None,
    mesh: Mesh | None = None,
    *,
    revision: str | None = None,
    remat: Remat = "none",
    scan_layers: bool = True,
) -> Decoder:
    """A Hugging Face model, ready to run: `model(tokens[B, T] int32) -> logits[B, T, V] float32`.

    Args:
        path: a model directory or a hub id.
        dtype: of stored weights and of activations, float32 or bfloat16.
        quantization: int8, int4 or nf4 for the linear layers except the output head; None keeps `dtype`.
        mesh: devices to shard over, with axes data, fsdp, expert, tensor (`jaxft.sharding.mesh.make_mesh`).
        revision: branch, tag or commit of a hub id.
        remat, scan_layers: see `Decoder`.

    Raises:
        ValueError: another dtype; or the directory, its config or its tensors are not what they should be.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; weights are stored in {' or '.join(DTYPES)} (or see `quantization`)")
    resolved = resolve_model(str(path), revision)
    config = decoder_config(read_json(resolved.path / "config.json"))
    if mesh is not None:
        check_mesh(config, mesh)
    checkpoint = Checkpoint.open(resolved.path)
    check_tensors(checkpoint, config)
    storage = jnp.dtype(dtype)
    form = parse_format(quantization) if isinstance(quantization, str) else quantization

    storages = {
        parameter: Storage.of(parameter, storage, form if is_quantized(parameter) else None, mesh)
        for parameter, _ in parameters(describe(config))
    }
    model = Decoder(config, load_weights(checkpoint, storages).__getitem__, storage, remat, scan_layers)
    model.source = Source(str(path), str(resolved.path), resolved.revision, fingerprint(checkpoint))
    if mesh is not None:
        bind(model, mesh)
    return model


def describe_model(config: DecoderConfig, dtype: str, form: Format | None) -> Decoder:
    """What `load_model` would give, without memory: `jax.ShapeDtypeStruct`s in place of arrays."""

    def make(parameter: Parameter) -> Weight:
        value = jnp.zeros(parameter.stacked_shape, jnp.dtype(dtype))
        return quantize(value, form) if form and is_quantized(parameter) else value

    return describe(config, make)


def is_quantized(parameter: Parameter) -> bool:
    """Quantization is for the matmuls inside the layers; embedding, output head, norms and biases stay as they are."""
    return parameter.name.endswith("_proj.weight")


def check_tensors(checkpoint: Checkpoint, config: DecoderConfig) -> None:
    """Every tensor of the file is a parameter of the model, and the reverse, with the same shape."""
    expected = {name: p.stored_shape for p, _ in parameters(describe(config)) for name in p.names}
    tied = config.names("lm_head.weight", None) if config.tie_word_embeddings else ()
    found = {
        name: checkpoint.info(name).shape
        for name in checkpoint.names()
        if not name.endswith(IGNORED) and name not in tied
    }
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
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
        )
        if names
    ]
    if problems:
        raise ValueError(f"{checkpoint.directory}: tensors do not fit config.json; " + "; ".join(problems))


def eos_token_ids(directory: Path, tokenizer_eos: int | None) -> list[int]:
    """Tokens that end a text: those of generation_config.json, else of config.json, and the tokenizer's own.

    Raises:
        ValueError: a file is damaged, or its `eos_token_id` is neither a token id nor a list of them.
    """
    found = {tokenizer_eos}
    for name in ("generation_config.json", "config.json"):
        declared = read_json(directory / name).get("eos_token_id") if (directory / name).exists() else None
        if declared is not None:
            ids = declared if isinstance(declared, list) else [declared]
            if not all(type(token) is int for token in ids):
                raise ValueError(
                    f"{directory / name}: eos_token_id must be a token id or a list of them, not {declared!r}"
                )
            found |= set(ids)
            break
    return sorted(found - {None})


def config_fingerprint(directory: Path) -> str:
    """Identifies what config.json says of the computation, not who wrote it or how the weights are stored."""
    config = {key: value for key, value in read_json(directory / "config.json").items() if key not in BOOKKEEPING}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def fingerprint(checkpoint: Checkpoint) -> str:
    """Identifies the weights without reading all of them: three samples from each tensor, its start, middle and end.

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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: the file is missing, is not JSON, or is not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        owner = BELONGS_TO.get(path.name)
        reason = f"; {path.parent} is not the directory of {owner}" if owner else ""
        raise ValueError(f"{path}: no such file{reason}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not an object")
    return value
