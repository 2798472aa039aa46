"""A tokenizer small enough to know by heart, and the real ones where they are at hand."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIALS = ("<|im_start|>", "<|im_end|>", "<eos>")


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token n is byte n of UTF-8; 256, 257 and 258 are SPECIALS. Pads with its end-of-text token."""
    shown = {
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    }  # bytes that stand for themselves in byte-level BPE
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte) if byte in shown else chr(256 + hidden.index(byte)): byte for byte in range(256)}
    backend = Tokenizer(models.BPE(letters, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="session")
def real_tokenizer(material: Path) -> Callable[..., PreTrainedTokenizerBase]:
    """Loads a tokenizer of the material by name, with more special tokens if asked for."""
    loaded: dict[tuple[str, ...], PreTrainedTokenizerBase] = {}

    def load(name: str, *specials: str) -> PreTrainedTokenizerBase:
        if (name, *specials) not in loaded:
            if name == "llama2":
                file = str(material / "tokenizers" / name / "tokenizer.json")
                tokenizer = PreTrainedTokenizerFast(
                    tokenizer_file=file, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
                )
            else:
                folder = "models" if (material / "models" / name).is_dir() else "tokenizers"
                tokenizer = AutoTokenizer.from_pretrained(material / folder / name)
            if specials:
                tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
            loaded[name, *specials] = tokenizer
        return loaded[name, *specials]

    return load
