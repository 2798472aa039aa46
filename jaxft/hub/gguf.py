"""Models in one file of llama.cpp: config and weights from a `.gguf`, in the names and the layout of Hugging Face.

The package `gguf` reads the header and knows how each type of block is dequantized; here rows are taken from the
file's bytes as they are asked for. What llama.cpp changes when it converts is undone: rows of q and k of a llama
stand as its rotary embedding wants them, interleaved; 1 is added to Gemma's norms; Llama 3's rotary frequencies are
divided by factors that are a tensor of the file. The tokenizer is not taken from the file; see `model_files`.

Source: convert_hf_to_gguf.py of llama.cpp, and its docs/gguf.md for the keys.
"""

import mmap
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft.hub.encoded import Encoded
from jaxft.hub.prequantized import Prequantized
from jaxft.hub.safetensors import SafetensorsError, TensorInfo, no_such_tensor
from jaxft.limits import memory_for

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies; part of the config, not of the weights."""

_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SANDWICH = _INSIDE | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_GEMMA2_KEYS = _KEYS | {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


class _Architecture(NamedTuple):
    """One `general.architecture`; `more` gives what its config has of its own, from the config so far."""

    causal_lm: str
    keys: Mapping[str, str] = _KEYS
    names: Mapping[str, str] = _INSIDE
    interleaved: bool = False  # rows of q and k
    norm_offset: float = 0.0  # of stored norms
    more: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {}


def _gemma2(config: dict[str, Any]) -> dict[str, Any]:
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    # The file does not say; llama.cpp knows the 27B, the only one of its own, by its 46 layers.
    scale = config["hidden_size"] // heads if layers == 46 else config["head_dim"]
    return {"query_pre_attn_scalar": scale, "hidden_activation": "gelu_pytorch_tanh"}


ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", interleaved=True),
    "qwen2": _Architecture("Qwen2ForCausalLM"),
    "qwen3": _Architecture("Qwen3ForCausalLM"),
    "gemma2": _Architecture("Gemma2ForCausalLM", _GEMMA2_KEYS, _SANDWICH, norm_offset=1.0, more=_gemma2),
}


class GgufFile:
    """The tensors of a GGUF file as they are stored: blocks as bytes, `[..., bytes of a row]`."""

    def __init__(self, path: Path):
        reader = _reader(path)
        self.directory = path
        self.metadata: Mapping[str, str] = {}
        self.fields = {name: _value(field) for name, field in reader.fields.items() if name[:10] != "tokenizer."}
        if (parts := self.fields.get("split.count", 1)) > 1:
            raise ValueError(f"{path}: one of {parts} parts of a model; join them with llama-gguf-split --merge")
        self.tensors: dict[str, TensorInfo] = {}
        self.types: dict[str, Any] = {}
        for tensor in reader.tensors:
            begin = int(tensor.data_offset)
            info = TensorInfo(tensor.data.dtype, tensor.data.shape, begin, begin + int(tensor.n_bytes))
            self.tensors[tensor.name], self.types[tensor.name] = info, tensor.tensor_type
        with open(path, "rb") as file, memory_for(path):
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self.tensors if name != ROPE_FACTORS)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def path(self, name: str) -> Path:
        """The file that holds `name`."""
        return self.directory

    def info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise SafetensorsError(f"{self.directory}: {no_such_tensor(name, self.tensors)}")
        return self.tensors[name]

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """As `SafetensorsFile.read`."""
        info = self.info(name)
        whole = np.frombuffer(self._map, np.uint8, info.nbytes, info.begin).view(info.dtype).reshape(info.shape)
        return whole if index is None else whole[(*index, ...)]

    def release(self, name: str) -> None:
        """As `SafetensorsFile.release`."""
        info = self.info(name)
        begin = info.begin - info.begin % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, begin, info.end - begin)


@dataclass(frozen=True, kw_only=True)
class Ggml(Encoded):
    """A tensor in any type of llama.cpp."""

    name: str
    kind: Any  # gguf.GGMLQuantizationType
    heads: int | None = None  # whose rows are interleaved
    offset: float = 0.0

    def decode(self, begin: int, end: int, columns: slice) -> np.ndarray:
        import gguf

        rows: slice | np.ndarray = slice(begin, end)
        if self.heads is not None:  # row 2i + h of a head is row h * (half the head) + i of Hugging Face's
            order = np.arange(self.shape[0]).reshape(self.heads, -1, 2).swapaxes(1, 2).reshape(-1)
            rows = order[rows]
        if self.ndim == 1:
            return gguf.dequantize(self.files.read(self.name)[rows], self.kind) - np.float32(self.offset)
        length, size = gguf.GGML_QUANT_SIZES[self.kind]  # of a block: values and bytes
        first, last = columns.start // length, -(-columns.stop // length)
        unit = size // self.files.info(self.name).dtype.itemsize
        blocks = self.files.read(self.name)[rows, ..., first * unit : last * unit]
        return gguf.dequantize(blocks, self.kind)[..., columns.start - first * length : columns.stop - first * length]


def open_gguf(path: Path) -> Prequantized:
    """The weights of a GGUF file, dequantized as they are read.

    Raises:
        ValueError: not a GGUF file, one of an architecture that is not supported, or the package gguf is missing.
    """
    file, config = GgufFile(path), read_gguf_config(path)
    architecture = ARCHITECTURES[config["model_type"]]
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    encoded: dict[str, Encoded] = {}
    for name in file.names():
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        module = architecture.names.get(match[2]) if match else None
        plain = f"model.layers.{match[1]}.{module}.{match[3]}" if match and module else _OUTSIDE.get(name)
        if plain is None:
            continue
        encoded[plain] = Ggml(
            files=file,
            shape=_shape(file, name),
            parts=(name,),
            name=name,
            kind=file.types[name],
            coded=file.types[name].name not in ("F64", "F32", "F16", "BF16"),
            heads=heads.get(match[2]) if match and architecture.interleaved else None,
            offset=architecture.norm_offset if name.endswith("norm.weight") else 0.0,
        )
    return Prequantized(file, encoded, "gguf")


def read_gguf_config(path: Path) -> dict[str, Any]:
    """What config.json would hold, from the header of a GGUF file.

    Raises:
        ValueError: as `open_gguf`; or the header lacks a key.
    """
    file = GgufFile(path)
    name = file.fields.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{path}: GGUF architecture {name!r} is not supported; supported: {', '.join(ARCHITECTURES)}. "
            "Give the safetensors checkpoint of the model"
        )
    if file.fields.get(f"{name}.expert_count"):
        raise ValueError(f"{path}: GGUF files with experts are not supported; give the safetensors checkpoint")
    architecture = ARCHITECTURES[name]

    def field(key: str) -> Any:
        if (value := file.fields.get(f"{name}.{key}")) is None:
            raise ValueError(f"{path}: the header has no {name}.{key}")
        return value

    config = {"architectures": [architecture.causal_lm], "model_type": name}
    config |= {ours: field(theirs) for theirs, ours in architecture.keys.items()}
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = file.fields.get(f"{name}.attention.head_count_kv", heads)
    config["head_dim"] = file.fields.get(f"{name}.attention.key_length", config["hidden_size"] // heads)
    config["vocab_size"] = _shape(file, "token_embd.weight")[0]
    config["tie_word_embeddings"] = "output.weight" not in file
    if name == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file
    config["rope_parameters"] = _rope(file, name, config)
    tokens = {f"{kind}_token_id": _token_id(path, kind) for kind in ("bos", "eos")}
    config |= {key: value for key, value in tokens.items() if value is not None}
    return config | architecture.more(config)


def _rope(file: GgufFile, name: str, config: dict[str, Any]) -> dict[str, Any]:
    where = f"{file.directory}: {name}.rope"
    dimensions = file.fields.get(f"{name}.rope.dimension_count", config["head_dim"])
    if dimensions != config["head_dim"]:
        raise ValueError(f"{where}.dimension_count is {dimensions}; only the whole head, {config['head_dim']}, can be")
    theta = float(file.fields.get(f"{name}.rope.freq_base", 10000.0))
    positions = config["max_position_embeddings"]
    if ROPE_FACTORS in file:
        factors = file.read(ROPE_FACTORS).astype(float).tolist()
        return {
            "rope_type": "longrope",  # the type that divides each frequency by a factor of its own
            "rope_theta": theta,
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": positions,
        }
    scaling = file.fields.get(f"{name}.rope.scaling.type", "none")
    factor = file.fields.get(f"{name}.rope.scaling.factor")
    if scaling == "none" or factor in (None, 1.0):
        return {"rope_type": "default", "rope_theta": theta}
    if scaling == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": float(factor)}
    raise ValueError(f"{where}.scaling.type {scaling!r} is not supported; give the safetensors checkpoint of the model")


def _shape(file: GgufFile, name: str) -> tuple[int, ...]:
    """Of the values, not of the bytes."""
    import gguf

    info, kind = file.info(name), file.types[name]
    if info.dtype != np.uint8:
        return info.shape
    return gguf.quant_shape_from_byte_shape(info.shape, kind)


def _token_id(path: Path, kind: str) -> int | None:
    field = _reader(path).get_field(f"tokenizer.ggml.{kind}_token_id")
    return None if field is None else int(field.contents())


def _value(field: Any) -> Any:
    """What a field holds; a f32 as the shortest decimal that names it, as it was written by hand: 1e-05."""
    value = field.contents()
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _reader(path: Path) -> Any:
    stat = os.stat(path)
    return _read_header(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=2)
def _read_header(path: Path, size: int, modified: int) -> Any:
    """Takes seconds where the vocabulary is large; `size` and `modified` notice that the file has become another."""
    try:
        import gguf
    except ImportError:
        raise ValueError(f"{path}: reading it needs the package gguf; run: pip install 'jaxft[gguf]'") from None
    try:
        with memory_for(path):
            reader = gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise ValueError(f"{path}: not a GGUF file, or a damaged one; download it again ({error})") from error
    end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    if end > size:
        raise ValueError(f"{path}: truncated: the header promises {end} bytes, the file has {size}; download it again")
    return reader
