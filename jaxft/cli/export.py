"""Take the result of a finished run away, as a PEFT adapter or merged into the original weights.

Only what is beyond doubt leaves: the run's files are as it wrote them, the base is the one it was trained
on, and what was written is read back. A merge starts from the base as it is on disk, in float32, whatever the run
computed in. The chat template and the token that ends an answer go along, so that what is served is what was
trained.
"""

import argparse
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.adapters.merge import merge
from jaxft.cli.command import end_of_turn, exit_code, local
from jaxft.config import Config
from jaxft.config_file import load_config
from jaxft.data.chat import Renderer, load_tokenizer
from jaxft.hub.load import config_fingerprint, eos_token_ids, fingerprint, load_model, open_model
from jaxft.hub.model_files import config_file, open_files, open_weights, read_config, read_json
from jaxft.hub.peft import CONFIG_FILE, TENSOR_STEM, load_adapter
from jaxft.hub.resolve import resolve_model
from jaxft.hub.save import copy_companions, save_model
from jaxft.models.config import Source
from jaxft.models.decoder import Decoder, describe_model, parameters
from jaxft.sharding import hosts

DTYPES = ("float32", "bfloat16", "float16")
TOLERANCE = 1e-5  # between logits before and after writing, relative to the largest


@dataclass(frozen=True)
class Run:
    """A finished run: its directory, its config, what `run.json` holds, and the directory of its result."""

    path: Path
    config: Config
    record: dict[str, Any]
    result: Path


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file in a directory, by its relative path; a run records them for its result."""
    result = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            result[path.relative_to(directory).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return result


def open_result(directory: Path) -> Run:
    """A run whose result is complete and undamaged.

    Raises:
        ValueError: no run, one that has not finished, or files that are not as it wrote them.
    """
    for name in ("run.json", "config.yaml"):
        if not (directory / name).is_file():
            raise ValueError(f"{directory}: not the output_dir of a run: it has no {name}")
    config, record = load_config(directory / "config.yaml"), read_json(directory / "run.json")
    result = directory / ("model" if config.adapter == "none" else "adapter")
    if not record.get("finished"):
        missing = "" if result.is_dir() else f", and there is no {result.name}/"
        raise ValueError(
            f"{directory}: the run has not finished{missing}; "
            "go on with it (resume_from_checkpoint=true), then export it"
        )
    if lacking := {"fingerprints", "result_sha256", "chat_template"} - record.keys():
        raise ValueError(f"{directory / 'run.json'} lacks {', '.join(sorted(lacking))}: damaged, or of another version")
    found = digests(result)
    for name, recorded in record["result_sha256"].items():
        if found.get(name) != recorded:
            fault = "does not match the SHA-256 in run.json: damaged" if name in found else "is missing"
            raise ValueError(
                f"{result / name} {fault}; put back a copy, or move {result.name}/ away and run the training "
                "again with resume_from_checkpoint=true, which writes it from the last checkpoint"
            )
    return Run(directory, config, record, result)


def find_base(run: Run) -> Source:
    """The base that the adapter was trained on, as it is on disk, at the same commit.

    Raises:
        ValueError: it is not there, or there are other weights in its place.
    """
    name = run.config.model_name_or_path
    resolved = resolve_model(name, read_json(run.result / CONFIG_FILE)["revision"])
    weights = fingerprint(open_files(resolved.path))
    found = {"base": weights, "base config": config_fingerprint(resolved.path)}
    for part, what in (("base", "weights"), ("base config", "config.json")):
        if found[part] != (recorded := run.record["fingerprints"][part]):
            raise ValueError(
                f"{name}: not the {what} that {run.path} was trained on (fingerprint {found[part][:12]}, recorded "
                f"{recorded[:12]}); put back what was there"
            )
    return Source(name, str(resolved.path), resolved.revision, weights)


def write_adapter(run: Run, directory: Path) -> None:
    """The adapter as PEFT reads it, with tokenizer and template. Reads no weights of the base."""
    if run.config.adapter == "none":
        raise ValueError(f"{run.path}: the run trained every weight (adapter: none); use --format merged")
    source = find_base(run)
    for name in (CONFIG_FILE, f"{TENSOR_STEM}.safetensors"):
        shutil.copyfile(run.result / name, directory / name)
    base = describe_model(open_model(Path(source.path))[0], "float32", None)
    base.source = source
    jax.eval_shape(lambda base: load_adapter(base, directory), base)
    add_tokenizer(Path(source.path), directory, run.record["chat_template"])


def add_tokenizer(base: Path, directory: Path, template: str | None) -> None:
    """Put tokenizer and chat template beside an adapter, so that it is asked as it was trained."""
    copy_companions(base, directory)
    (directory / "generation_config.json").unlink(missing_ok=True)  # the base's own is used
    carry_template(directory, template)


def write_merged(run: Run, directory: Path, dtype: str | None) -> str:
    """A model of its own; returns the dtype of its weights.

    By default that is the dtype of the checkpoint that was adapted, or the one that a full training computed in.

    Raises:
        ValueError: as `find_base`; or the weights do not fit `dtype`.
    """
    if run.config.adapter == "none":
        dtype = dtype or run.config.dtype
        storage = _storage(run.result, dtype)
        model = load_model(run.result, storage)
    else:
        base = Path(find_base(run).path)
        dtype = dtype or _checkpoint_dtype(base)
        storage = _storage(base, dtype)
        model = merge(load_adapter(load_model(base, storage), run.result), donate=True)
    if storage != dtype:
        _round(model, dtype)
    expected = _logits(model)
    if not np.isfinite(expected).all():
        raise ValueError(f"{run.path}: the merged model's logits are not finite in {dtype}; choose another --dtype")
    save_model(model, directory, dtype)
    del model  # makes room for its copy
    difference = np.abs(_logits(load_model(directory, storage)) - expected).max()
    if not difference <= TOLERANCE * np.abs(expected).max():
        raise ValueError(f"what was written to disk differs from the merged model: logits by up to {difference:g}")
    carry_template(directory, run.record["chat_template"])
    stop_at_end_of_turn(directory, run.record["chat_template"])
    return dtype


def carry_template(directory: Path, template: str | None) -> None:
    """Make this the only chat template of a tokenizer's directory, unless it is its default already."""
    own = load_tokenizer(directory).chat_template
    if template is None or template == (own.get("default") if isinstance(own, dict) else own):
        return
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    (directory / "chat_template.json").unlink(missing_ok=True)
    shutil.rmtree(directory / "additional_chat_templates", ignore_errors=True)
    path = directory / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    if settings.pop("chat_template", None) is not None:
        _write_json(path, settings)


def stop_at_end_of_turn(directory: Path, template: str | None) -> None:
    """Let generation end where the template ends an answer; a base model's own settings may not name it."""
    tokenizer = load_tokenizer(directory)
    stops = eos_token_ids(directory, tokenizer.eos_token_id)
    if template and (missing := end_of_turn(Renderer(tokenizer, template)) - set(stops)):
        path = directory / "generation_config.json"
        settings = read_json(path) if path.exists() else {}
        _write_json(path, {**settings, "eos_token_id": sorted({*stops, *missing})})


@contextmanager
def staged(output: Path, replace: bool = False) -> Iterator[Path]:
    """A directory to write into, which comes to be at `output` when all is written, or not at all.

    Raises:
        ValueError: something is there, and it is not to be replaced.
    """
    output = output.expanduser().absolute()
    if not replace and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} is {'not empty' if output.is_dir() else 'a file'}; choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    stage = output.with_name(f".{output.name}.{secrets.token_hex(4)}.tmp")
    stage.mkdir()
    try:
        yield stage
        if replace and output.exists():
            shutil.rmtree(output)
        os.replace(stage, output)
    except BaseException:
        shutil.rmtree(stage)
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for bad input."""
    return exit_code(partial(_run, _parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Export a finished run as a PEFT adapter or as a merged model.")
    add = parser.add_argument
    add("--run", required=True, type=local, metavar="DIR", help="output_dir of the run")
    add("--format", required=True, choices=("peft", "merged"), help="an adapter, or a model of its own")
    add("--output", required=True, type=local, metavar="DIR", help="new or empty")
    add("--dtype", choices=DTYPES, help="of merged weights (default: as in the base's checkpoint)")
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.format == "peft" and options.dtype:
        raise ValueError("--dtype is for --format merged; an adapter stays in float32, as it was trained")
    if not hosts.is_writer():
        return  # there is nothing to share out: one host has room for the model, or none has
    run, output = open_result(Path(options.run)), Path(options.output)
    with staged(output) as stage, _host():
        if options.format == "peft":
            write_adapter(run, stage)
            what = f"PEFT adapter for {run.config.model_name_or_path}"
        else:
            what = f"merged model, {write_merged(run, stage, options.dtype)}"
    print(f"wrote {output}: {what}")


def _host() -> AbstractContextManager:
    """The CPU, where float32 is float32 in every product, and where there is most memory."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError as error:
        raise ValueError(f"exports are computed on the CPU, which JAX cannot use: {error}; see JAX_PLATFORMS") from None


def _checkpoint_dtype(model: Path) -> str:
    config = read_config(model)
    found = config.get("dtype") or config.get("torch_dtype") or "float32"
    if found not in DTYPES:
        raise ValueError(f"{config_file(model)}: the dtype is {found!r}; choose one with --dtype")
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


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
