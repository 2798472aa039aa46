"""jaxft: fine-tune Hugging Face models in JAX, on TPUs and GPUs, and leave with a PEFT adapter.

A name is imported when it is first used, so that a part of jaxft needs no more libraries than its own.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxft.adapters.merge import merge as merge_adapter
    from jaxft.cli.train import train
    from jaxft.hub.load import load_model
    from jaxft.hub.peft import load_adapter, save_adapter
    from jaxft.hub.save import save_model

__all__ = ["load_adapter", "load_model", "merge_adapter", "save_adapter", "save_model", "train"]

_FOUND_IN = {
    "load_adapter": ("jaxft.hub.peft", "load_adapter"),
    "load_model": ("jaxft.hub.load", "load_model"),
    "merge_adapter": ("jaxft.adapters.merge", "merge"),
    "save_adapter": ("jaxft.hub.peft", "save_adapter"),
    "save_model": ("jaxft.hub.save", "save_model"),
    "train": ("jaxft.cli.train", "train"),
}


def __getattr__(name: str) -> object:
    if name not in _FOUND_IN:
        raise AttributeError(f"module 'jaxft' has no attribute {name!r}")
    module, attribute = _FOUND_IN[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
