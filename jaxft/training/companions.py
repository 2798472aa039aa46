"""Prepares the files beside exported weights: tokenizer, chat template and the tokens that end an answer.

An adapter or a model is asked as it was trained and stops where its examples ended, in programs that know nothing of
the run. Those look for an end of text in the tokenizer and in generation settings, so both name the token that was
learned. How texts are tokenized does not change.
"""

import json
import logging
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from jaxft.data.chat import load_tokenizer
from jaxft.hub.load import eos_token_ids
from jaxft.hub.model_files import read_json
from jaxft.hub.tokenizer_files import (
    SETTINGS,
    SPECIALS,
    TEXT_EOS,
    drop_tokens_beyond,
    set_eos_token,
    set_stop_ids,
    write_json,
)

logger = logging.getLogger(__name__)

_SAMPLES = ("a", "The quick brown fox", "Zwölf Boxkämpfer\n\n  x = 1", "你好")


def stop_tokens(
    base: Path, tokenizer: PreTrainedTokenizerBase, end_of_turn: Collection[int], learned: bool, rows: int
) -> dict[str, int]:
    """The tokens that end what the model writes: token -> id, first the one to be the tokenizer's `eos_token`.

    Ids that the tokenizer or the embedding does not have, which some settings name, are left out with a warning.

    Args:
        base: directory or GGUF file of the model that was trained, whose own settings stay valid.
        end_of_turn: what ends an answer in the chat template.
        learned: whether examples taught it; texts and completions teach the tokenizer's own instead.
        rows: of the embedding.
    """
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    first = [*end_of_turn, *own] if learned else [*own, *end_of_turn]
    ids = list(dict.fromkeys([*first, *eos_token_ids(base, None)]))
    known = {index for index in tokenizer.get_vocab().values() if index < rows}
    if unknown := [index for index in ids if index not in known]:
        logger.warning(
            "%s names ends of text that are no tokens of it, which are left out of the export: %s",
            base,
            ", ".join(map(str, unknown)),
        )
    ids = [index for index in ids if index in known]
    return dict(zip(tokenizer.convert_ids_to_tokens(ids), ids, strict=True))


def dress(directory: Path, template: str | None, stops: Mapping[str, int], rows: int) -> None:
    """Change a tokenizer's files, copied from a base model, to fit the trained model.

    Args:
        directory: holds the files; config.json as well where it is a model's.
        template: the chat template of the run, which becomes the only one.
        stops: as `stop_tokens` gives them.
        rows: of the model's embedding.
    """
    if dropped := drop_tokens_beyond(directory, rows):
        logger.warning(
            "%d tokens of the tokenizer have no row in the embedding of %d rows and are left out of the export: %s",
            len(dropped),
            rows,
            ", ".join(dropped[:5]),
        )
    set_stop_ids(directory, sorted(stops.values()), rows)
    first = next(iter(stops), None)
    before = load_tokenizer(directory).eos_token
    if first is not None and first != before:
        _change_eos(directory, first, before)
    carry_template(directory, _with_old_eos(directory, template))


def carry_template(directory: Path, template: str | None) -> None:
    """Make this the only chat template of a tokenizer's directory, unless it is its default already."""
    own = load_tokenizer(directory).chat_template
    if template is None or template == (own.get("default") if isinstance(own, dict) else own):
        return
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    (directory / "chat_template.json").unlink(missing_ok=True)
    shutil.rmtree(directory / "additional_chat_templates", ignore_errors=True)
    settings = _settings(directory)
    if settings.pop("chat_template", None) is not None:
        write_json(directory / SETTINGS, settings)


def _with_old_eos(directory: Path, template: str | None) -> str | None:
    """The template as it renders with another `eos_token`: one that writes EOS goes on writing the one of training."""
    trained = _settings(directory).get(TEXT_EOS)
    if template is None or trained is None or not re.search(r"\beos_token\b", template):
        return template
    return f"{{% set eos_token = {json.dumps(trained, ensure_ascii=False)} %}}\n{template}"


def _change_eos(directory: Path, token: str, before: str | None) -> None:
    """Name another `eos_token`, where texts stay the same tokens.

    Some tokenizers append their EOS to each text. There the old one stays, and a warning says so.
    """
    kept = {name: (directory / name).read_bytes() for name in (SETTINGS, SPECIALS) if (directory / name).exists()}
    appends = _settings(directory).get("add_eos_token")
    expected = load_tokenizer(directory)(list(_SAMPLES)).input_ids
    set_eos_token(directory, token, before)
    if appends or load_tokenizer(directory)(list(_SAMPLES)).input_ids != expected:
        for name, content in kept.items():
            (directory / name).write_bytes(content)
        logger.warning(
            "the tokenizer appends its eos_token, %s, to every text, so it keeps that name; programs that stop at "
            "tokenizer.eos_token_id only will not stop at %s, which generation_config.json names",
            before,
            token,
        )


def _settings(directory: Path) -> dict[str, Any]:
    path = directory / SETTINGS
    return read_json(path) if path.exists() else {}
