"""Write a model as a Hugging Face directory: weights, config, tokenizer, chat template, generation settings."""

import json
import shutil
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.adapters.attach import sites
from jaxft.hub.checkpoint import Checkpoint, refuse_weights, write_checkpoint
from jaxft.hub.model_files import companions_of, read_config
from jaxft.hub.safetensors import TensorInfo
from jaxft.hub.stage import staged_in
from jaxft.hub.text_part import TextPart
from jaxft.models.decoder import Decoder, parameters
from jaxft.models.hf_config import decoder_config
from jaxft.models.parameter import Parameter
from jaxft.quantization.qtensor import QTensor
from jaxft.sharding.arrays import on_host
from jaxft.sharding.hosts import is_writer

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "preprocessor_config.json",
    "processor_config.json",
)
"""What a model directory holds beside config and weights."""

_MOVED = (
    "the model was moved or changed while it was in use. Put it back; "
    "a run that had trained to its end is then exported by resume_from_checkpoint=true"
)


def save_model(
    model: Decoder, directory: str | Path, dtype: str | None = None, *, max_shard_bytes: int = 5_000_000_000
) -> Path:
    """Write a model that transformers loads. Returns the directory.

    Config, tokenizer, template and generation settings are copied from where the model was read from.

    Where the model is the part for text of one that can see, the rest is copied from there, too.

    Of several processes all call it, and process 0 writes: each tensor that is cut over hosts is gathered when its turn
    comes.

    Args:
        model: without adapter (`jaxft.merge_adapter` first) and without quantization.
        directory: new or empty of weights.
        dtype: of the weights written, float32, bfloat16 or float16; each tensor's own when absent.
        max_shard_bytes: size of one file.

    Raises:
        ValueError: an adapter or quantized weights, no source directory, or weights already there.
    """
    for site in sites(model):
        if site.linear.adapter is not None:
            raise ValueError("the model carries an adapter: merge it first, or write it with save_adapter")
        if isinstance(site.linear.weight.get_value(), QTensor):
            raise ValueError(f"{site.modules[0]} is quantized; load the model without quantization to write it")
    if model.source is None:
        raise ValueError("the model was not read from a directory; there is no config and no tokenizer to write")
    directory = Path(directory).expanduser()
    if is_writer() and directory.is_dir():
        refuse_weights(directory)
    values = _by_name(model)
    specs = {
        name: jax.ShapeDtypeStruct(parameter.stored_shape, jnp.dtype(dtype or array.dtype))
        for name, (parameter, array, _) in values.items()
    }
    source = Path(model.source.path)
    config = read_config(source)
    quantized = config.pop("quantization_config", None)  # of the checkpoint that was read; what is written is plain
    rest: dict[str, TensorInfo] = {}
    if model.config.part_of is not None:
        if quantized is not None:
            raise ValueError(f"{source}: what it has beside text is quantized; give the full-precision checkpoint")
        whole = TextPart(Checkpoint.open(source))
        rest = {name: whole.files.info(name) for name in whole.others}
        values = {whole.stored[name]: value for name, value in values.items()}
        specs = {whole.stored[name]: spec for name, spec in specs.items()}

    def produce(name: str) -> np.ndarray:
        if name in rest:
            value = np.array(whole.files.read(name))
            whole.files.release(name)
            return value
        parameter, array, index = values[name]
        value = on_host(array[index] if index else array).astype(specs[name].dtype, copy=False)
        return value.swapaxes(-1, -2) if parameter.transposed else value

    if not is_writer():
        for name in values:
            produce(name)  # its part in the gathering
        return directory
    if decoder_config(config).tie_word_embeddings != model.config.tie_word_embeddings:
        config["tie_word_embeddings"] = model.config.tie_word_embeddings
    (written, _), *_ = Counter(str(spec.dtype) for spec in specs.values()).most_common(1)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and (part is config or {"dtype", "torch_dtype"} & part.keys()):
            part["torch_dtype" if "torch_dtype" in part else "dtype"] = written
    with staged_in(directory) as stage:
        write_checkpoint(stage, specs | rest, produce, max_shard_bytes=max_shard_bytes)
        (stage / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_companions(source, stage)
    return directory


def copy_companions(source: Path, directory: Path) -> None:
    """Copy tokenizer, template and generation settings of the model `source`.

    Raises:
        ValueError: it is not there any more.
    """
    source = companions_of(source)
    if not source.is_dir():
        raise ValueError(f"{source}: no such directory; {_MOVED}")
    for name in COMPANIONS:
        if (source / name).is_dir():
            shutil.copytree(source / name, directory / name, dirs_exist_ok=True)
        elif (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def require_tokenizer(directory: Path, source: Path) -> None:
    """Refuse to go on without the tokenizer that should have come from the model `source`.

    Raises:
        ValueError: names where it was to come from.
    """
    if not any(
        (directory / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    ):
        raise ValueError(f"{companions_of(source)} holds no tokenizer any more; {_MOVED}")


def _by_name(model: Decoder) -> dict[str, tuple[Parameter, jax.Array, tuple[int, ...]]]:
    """Hugging Face tensor name -> its declaration, the array that holds it, and its place in the stack."""
    return {
        name: (parameter, variable.get_value(), index)
        for parameter, variable in parameters(model)
        for name, index in zip(parameter.names, np.ndindex(parameter.stack), strict=True)
    }
