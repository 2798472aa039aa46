"""What a model is read from: a Hugging Face directory, or a GGUF file with the tokenizer's files beside it.

Everything that asks a model for its config, its weights or its tokenizer asks here, and need not know which it is.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxft.hub.checkpoint import Checkpoint
from jaxft.hub.encoded import Files
from jaxft.hub.gguf import GgufFile, open_gguf, read_gguf_config
from jaxft.hub.prequantized import Weights, open_directory
from jaxft.hub.resolve import is_gguf
from jaxft.limits import memory_for

BELONGS_TO = {"config.json": "a model", "adapter_config.json": "a PEFT adapter"}
"""What a directory holds that has such a file."""


def config_file(model: Path) -> Path:
    """What the config stands in: config.json, or the GGUF file itself."""
    return model if is_gguf(model) else model / "config.json"


def read_config(model: Path) -> dict[str, Any]:
    """What config.json holds, or would hold.

    Raises:
        ValueError: it cannot be read, or a GGUF file is of an architecture that is not supported.
    """
    return read_gguf_config(model) if is_gguf(model) else read_json(model / "config.json")


def open_files(model: Path) -> Files:
    """The tensors as they are stored."""
    return GgufFile(model) if is_gguf(model) else Checkpoint.open(model)


def open_weights(model: Path, config: Mapping[str, Any]) -> Weights:
    """The weights under their plain names, whatever they are stored as; `config` is what `read_config` gave.

    Raises:
        ValueError: as `jaxft.hub.prequantized.open_directory` and `jaxft.hub.gguf.open_gguf`.
    """
    return open_gguf(model) if is_gguf(model) else open_directory(model, config)


def companions_of(model: Path) -> Path:
    """The directory with tokenizer, chat template and generation settings."""
    return model.parent if is_gguf(model) else model


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: the file is missing, is not JSON, or is not an object.
    """
    try:
        with memory_for(path):
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
