"""Exports the result of a finished run, as a PEFT adapter or merged into the original weights.

An export is checked: the run's files are unchanged, the base is the one that the run trained on, and the written
files are read back. A merge starts from the base as it is on disk, in float32, whatever the run
computed in. The tokenizer, the chat template and the tokens that end an answer go along, so that what is served is
what was trained.
"""

import argparse
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.adapters.merge import merge
from jaxft.adapters.portable import portable
from jaxft.cli.command import exit_code, local
from jaxft.hub.card import Card, write_card
from jaxft.hub.consumers import Adapter, adapter_of, consumers
from jaxft.hub.digests import write_digests
from jaxft.hub.load import load_model, open_model
from jaxft.hub.model_files import config_file, open_weights, read_config, read_json
from jaxft.hub.peft import TENSOR_STEM, base_of, load_adapter, save_adapter
from jaxft.hub.peft_config import CONFIG_FILE
from jaxft.hub.resolve import is_gguf, is_repo_id
from jaxft.hub.save import copy_companions, save_model
from jaxft.hub.stage import staged
from jaxft.hub.tokenizer_files import write_json
from jaxft.models.config import Source
from jaxft.models.decoder import Decoder, describe_model, parameters
from jaxft.sharding import hosts
from jaxft.training.companions import dress
from jaxft.training.export import data_digests, template_name
from jaxft.training.result import Run, find_base, open_result

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
TOLERANCE = 1e-5  # between logits before and after writing, relative to the largest


class BaseName(NamedTuple):
    """The name of the base in an export: a repository and its commit if known, or an absolute path."""

    name: str
    revision: str | None


def base_name(run: Run, source: Source | None, given: str | None) -> BaseName:
    """What was asked for, else the repository at the commit that was trained on, else where the base is now.

    Args:
        source: the base as it was found; None: it was not looked for.
        given: ORG/NAME or an absolute path; None: nothing was asked for.
    """
    if given is not None:
        return BaseName(given, None)
    recorded = run.record["base"]
    if recorded["revision"] is not None:  # the same weights, wherever a copy of them is
        return BaseName(recorded["name"], recorded["revision"])
    return BaseName(recorded["path"], None) if source is None else BaseName(*base_of(source))


def write_adapter(run: Run, directory: Path, source: Source, called: BaseName, fold: bool) -> Adapter:
    """The adapter as PEFT reads it, with tokenizer and template. Reads no weights of the base.

    Args:
        source: the base.
        called: the base's name in the adapter.
        fold: in the form that every reader scales alike (`jaxft.adapters.portable`).
    """
    base = describe_model(open_model(Path(source.path))[0], "float32", None)
    base.source = source
    model = load_adapter(base, run.result)
    other_weights = is_gguf(Path(source.path)) and called != BaseName(*base_of(source))
    if other_weights:
        model.source = None  # with the fingerprint of the GGUF file, the adapter would refuse those it is to be used on
    if fold:
        model = portable(model)
    if fold or other_weights:
        save_adapter(model, directory)
    else:
        for name in (CONFIG_FILE, f"{TENSOR_STEM}.safetensors"):
            shutil.copyfile(run.result / name, directory / name)
    settings = read_json(directory / CONFIG_FILE)
    settings |= {"base_model_name_or_path": called.name, "revision": called.revision}
    write_json(directory / CONFIG_FILE, dict(sorted(settings.items())))
    copy_companions(run.result, directory)
    dress(directory, run.record["chat_template"], run.record["stop_tokens"], base.config.vocab_size)
    adapter = adapter_of(model, Path(called.name))
    write_card(directory, card_of(run, called, adapter))
    write_digests(directory)
    return adapter


def write_merged(run: Run, directory: Path, dtype: str | None, source: Source | None, called: BaseName) -> str:
    """Write a merged or fully trained model; returns the dtype of its weights.

    By default that is the dtype of the checkpoint that was adapted, or the one that a full training computed in.

    Args:
        source: the base of an adapter.
        called: the base's name in the model card.

    Raises:
        ValueError: the weights do not fit `dtype`.
    """
    if source is None:
        dtype = dtype or run.config.dtype
        storage = _storage(run.result, dtype)
        model = load_model(run.result, storage)
    else:
        base = Path(source.path)
        dtype = dtype or checkpoint_dtype(base)
        storage = _storage(base, dtype)
        model = merge(load_adapter(load_model(base, storage), run.result), donate=True)
    if storage != dtype:
        _round(model, dtype)
    expected, rows = _logits(model), model.config.vocab_size
    if not np.isfinite(expected).all():
        raise ValueError(f"{run.path}: the merged model's logits are not finite in {dtype}; choose another --dtype")
    save_model(model, directory, dtype)
    del model  # makes room for its copy
    difference = np.abs(_logits(load_model(directory, storage)) - expected).max()
    if not difference <= TOLERANCE * np.abs(expected).max():
        raise ValueError(f"what was written to disk differs from the merged model: logits by up to {difference:g}")
    copy_companions(run.result, directory)
    dress(directory, run.record["chat_template"], run.record["stop_tokens"], rows)
    write_card(directory, card_of(run, called, None))
    return dtype


def card_of(run: Run, called: BaseName, adapter: Adapter | None) -> Card:
    """The model card of an export."""
    record = run.record
    return Card(
        title=run.path.absolute().name,
        base=called.name,
        revision=called.revision,
        adapter=adapter,
        stops=record["stop_tokens"],
        template=template_name(run.config, record["chat_template"]),
        data=data_digests(record["fingerprints"], record["data"]["held_out"]),
        versions=record["versions"],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for bad input."""
    return exit_code(partial(_run, _parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Export a finished run as a PEFT adapter or as a merged model.")
    add = parser.add_argument
    add("--run", required=True, type=local, metavar="DIR", help="output_dir of the run")
    add("--format", required=True, choices=("peft", "merged"), help="an adapter, or a model of its own")
    add("--output", required=True, type=local, metavar="DIR", help="new or empty")
    add("--portable", action="store_true", help="with peft: a form that llama.cpp and SGLang scale as PEFT does")
    add("--base", type=local, metavar="DIR", help="where the base is now, if it was moved since the training")
    add("--base-name", metavar="NAME", help="what the export calls its base: ORG/NAME or /DIR (default: where it is)")
    add("--dtype", choices=DTYPES, help="of merged weights (default: as in the base's checkpoint)")
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.format == "peft" and options.dtype:
        raise ValueError("--dtype is for --format merged; an adapter stays in float32, as it was trained")
    if options.format == "merged" and options.portable:
        raise ValueError("--portable is for --format peft; a merged model has no adapter to be scaled")
    given = options.base_name
    if given is not None and not (given.startswith("/") or is_repo_id(given)):
        raise ValueError(f"--base-name {given!r} is no repository and no absolute path; give ORG/NAME or /DIR")
    if not hosts.is_writer():
        return  # there is nothing to share out: one host has room for the model, or none has
    run, output = open_result(Path(options.run)), Path(options.output)
    if options.format == "peft" and run.full:
        raise ValueError(f"{run.path}: the run trained every weight (adapter: none); use --format merged")
    if run.full and options.base:
        raise ValueError(f"--base is where the base of an adapter is; {run.path} trained every weight and needs none")
    source = None if run.full else find_base(run, options.base)
    called, told = base_name(run, source, given), []
    with staged(output) as stage, _host():
        if options.format == "peft":
            told = consumers(write_adapter(run, stage, source, called, options.portable))
            what = f"PEFT adapter for {called.name}{f' at {called.revision}' if called.revision else ''}"
        else:
            what = f"merged model, {write_merged(run, stage, options.dtype, source, called)}"
            told = _left_behind(source)
    print(f"wrote {output}: {what}", *told, sep="\n")


def _left_behind(source: Source | None) -> list[str]:
    """What the base's directory says of itself, and its export does not."""
    names = [] if source is None else [path.name for path in Path(source.path).glob("*") if path.is_file()]
    papers = sorted(name for name in names if name.upper().startswith(("README", "LICEN", "NOTICE", "USE_POLICY")))
    return [f"not carried from the base: {', '.join(papers)}; its terms may ask you to add them"] if papers else []


def _host() -> AbstractContextManager:
    """The CPU, where float32 is float32 in every product, and where there is most memory."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError as error:
        raise ValueError(f"exports are computed on the CPU, which JAX cannot use: {error}; see JAX_PLATFORMS") from None


def checkpoint_dtype(model: Path) -> str:
    """What the weights of a checkpoint are: as its config says, else as most of them are stored.

    Where the two differ, or tensors are of several dtypes, a warning says so.
    """
    config = read_config(model)
    weights = open_weights(model, config)
    sizes: Counter[str] = Counter()
    for name in weights.names():
        sizes[str(weights.info(name).dtype)] += int(np.prod(weights.info(name).shape))
    part = config.get("text_config") or {}
    declared = next((one[key] for one in (config, part) for key in ("dtype", "torch_dtype") if one.get(key)), None)
    found = declared or sizes.most_common(1)[0][0]
    if found not in DTYPES:
        raise ValueError(f"{config_file(model)}: the dtype is {found!r}; choose one with --dtype")
    if set(sizes) != {found}:
        stored = ", ".join(f"{count:,} values in {dtype}" for dtype, count in sizes.most_common())
        logger.warning("%s holds %s; all is written as %s (see --dtype)", model, stored, found)
    return found


def _storage(directory: Path, dtype: str) -> str:
    """What the weights are held in: float32, or bfloat16 where that is what they come from and what they go to.

    Then the sum with the adapter, made in float32, is rounded once either way.
    """
    weights = open_weights(directory, read_config(directory))
    found = {str(weights.info(name).dtype) for name in weights.names()}
    return dtype if found == {dtype} == {"bfloat16"} else "float32"


def _round(model: Decoder, dtype: str) -> None:
    """Give the weights, in float32, the values that `dtype` stores."""
    for _, variable in parameters(model):
        variable.set_value(_rounded(variable.get_value(), dtype))


@partial(jax.jit, static_argnames="dtype", donate_argnames="weight")
def _rounded(weight: jax.Array, dtype: str) -> jax.Array:
    """In the memory of the weight given. XLA would drop a cast there and back."""
    return jax.lax.reduce_precision(weight, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)


@jax.jit
def _forward(model: Decoder) -> jax.Array:
    count, vocabulary = 16, model.config.vocab_size
    return model(jnp.arange(count, dtype=jnp.int32)[None] * (vocabulary // count))


def _logits(model: Decoder) -> np.ndarray:
    """Logits on tokens from all over the vocabulary."""
    return np.asarray(_forward(model))
