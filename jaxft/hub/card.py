"""Writes the README.md of an exported result: what it is, what it was made from, and the commands that use it."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxft.hub.consumers import Adapter, consumers, vllm_rank
from jaxft.hub.digests import CARD_FILE

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
"""Where a chat template may be; else it is in tokenizer_config.json."""


@dataclass(frozen=True)
class Card:
    """The contents of a model card.

    Attributes:
        title: what the model is called.
        base: a repository or an absolute path.
        revision: the commit of a repository.
        adapter: None for a whole model.
        stops: token -> id, first the tokenizer's `eos_token`.
        template: what the chat template is called, or None where there is none.
        data: what was trained on -> its SHA-256.
        versions: of the packages that trained it.
    """

    title: str
    base: str
    revision: str | None
    adapter: Adapter | None
    stops: Mapping[str, int]
    template: str | None
    data: Mapping[str, str]
    versions: Mapping[str, str]


def write_card(directory: Path, card: Card) -> None:
    """Write it as README.md, beside the tokenizer and the chat template."""
    file = next((name for name in TEMPLATE_FILES if (directory / name).exists()), "tokenizer_config.json")
    (directory / CARD_FILE).write_text(f"{_front(card)}\n{_body(card, file)}", encoding="utf-8")


def _front(card: Card) -> str:
    """The YAML that registries read. JSON strings are YAML strings, whatever they hold.

    A base in a local directory is left out: the Hub takes repositories only, and converters make addresses of the name.
    """
    if card.adapter is None:
        library, tags = "transformers", ["jaxft"]
    else:
        kind = "dora" if card.adapter.use_dora else "lora"
        library, tags = "peft", ["jaxft", kind, *["rslora"] * card.adapter.use_rslora]
    lines = [
        *([] if card.base.startswith("/") else [f"base_model: {_quoted(card.base)}"]),
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        f"model_name: {_quoted(card.title)}",
        "tags:",
        *(f"- {tag}" for tag in tags),
    ]
    return "\n".join(["---", *lines, "---", ""])


def _body(card: Card, template_file: str) -> str:
    kind = "A whole model" if card.adapter is None else "An adapter (PEFT)"
    at = f" at commit `{card.revision}`" if card.revision else ""
    stops = ", ".join(f"`{token}` ({index})" for token, index in card.stops.items()) or "none is known"
    lines = [
        f"# {card.title}",
        "",
        f"{kind}, fine-tuned with jaxft.",
        "",
        f"- Base: `{card.base}`{at}.",
        f"- Chat template: {'none' if card.template is None else f'{card.template} ({template_file})'}.",
        f"- Texts end with: {stops}. The first is the tokenizer's `eos_token`; `generation_config.json` names all.",
        *(f"- SHA-256 of the {name}: `{digest}`." for name, digest in card.data.items()),
        f"- Made with: {', '.join(f'{name} {version}' for name, version in card.versions.items())}.",
    ]
    if card.adapter is not None and (told := consumers(card.adapter)):
        lines += ["", "Not every program takes this adapter as it is (the options are those of jaxft's export.py):", ""]
        lines += [f"- {line}." for line in told]
    if card.adapter is not None and card.adapter.gguf:  # nothing loads this base
        return "\n".join([*lines, ""])
    lines += ["", "In these commands DIR is this directory.", ""]
    lines += _model_commands(card) if card.adapter is None else _adapter_commands(card, card.adapter, template_file)
    return "\n".join([*lines, ""])


def _adapter_commands(card: Card, adapter: Adapter, template_file: str) -> list[str]:
    base, chat = shlex.quote(card.base), card.template is not None
    at = f" --revision {card.revision}" if card.revision else ""
    local = base if card.base.startswith("/") else f'"$(hf download {base}{at})"'
    lines = ["PEFT:", "", *_code("python", _python("peft", "AutoPeftModelForCausalLM", chat))]
    if adapter.use_dora or adapter.transposed:
        return lines
    options = "--enable-lora --lora-modules tuned=DIR --max-lora-rank"
    serve = f"vllm serve {base}{at} --tokenizer DIR --generation-config DIR {options} {vllm_rank(adapter.rank)}"
    lines += ["", "vLLM, which takes tokenizer, chat template and stop tokens from the base unless told:", ""]
    lines += _code("bash", serve)
    if not adapter.parameters:
        convert = [
            f"python convert_hf_to_gguf.py {local} --outfile base.gguf",
            f"python convert_lora_to_gguf.py DIR --base {local} --outfile adapter.gguf",
            f"llama-cli -m base.gguf --lora adapter.gguf{_llama_template(template_file) if chat else ''}",
        ]
        lines += ["", "llama.cpp, whose converter must be told where a local copy of the base is:", ""]
        lines += _code("bash", "\n".join(convert))
    return lines


def _model_commands(card: Card) -> list[str]:
    chat = card.template is not None
    convert = ["python convert_hf_to_gguf.py DIR --outfile model.gguf", f"llama-cli -m model.gguf{' --jinja' * chat}"]
    return [
        *("transformers:", "", *_code("python", _python("transformers", "AutoModelForCausalLM", chat))),
        *("", "vLLM:", "", *_code("bash", "vllm serve DIR")),
        *("", "llama.cpp:", "", *_code("bash", "\n".join(convert))),
    ]


def _llama_template(file: str) -> str:
    """The options for it: one that has no file of its own is the base's, which base.gguf holds."""
    return f" --jinja --chat-template-file DIR/{file}" if file.endswith(".jinja") else " --jinja"


def _python(package: str, model: str, chat: bool) -> str:
    """A program that asks the model once, and stops where it was trained to."""
    if chat:
        ask = """inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "..."}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""
    else:
        ask = 'inputs = tokenizer("...", return_tensors="pt")'
    return f"""from {package} import {model}
from transformers import AutoTokenizer, GenerationConfig

model = {model}.from_pretrained("DIR")
tokenizer = AutoTokenizer.from_pretrained("DIR")
{ask}
tokens = model.generate(
    **inputs, generation_config=GenerationConfig.from_pretrained("DIR"), max_new_tokens=200
)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def _code(language: str, text: str) -> list[str]:
    return [f"```{language}", text, "```"]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
