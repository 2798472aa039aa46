"""jaxft: fine-tune Hugging Face models in JAX, on TPUs and GPUs, and leave with a PEFT adapter."""

from jaxft.adapters.merge import merge as merge_adapter
from jaxft.cli.train import train
from jaxft.hub.load import load_model
from jaxft.hub.peft import load_adapter, save_adapter
from jaxft.hub.save import save_model

__all__ = ["load_adapter", "load_model", "merge_adapter", "save_adapter", "save_model", "train"]
