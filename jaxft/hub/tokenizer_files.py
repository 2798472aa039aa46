"""The files of a tokenizer beside an adapter or a model, changed so that other programs stop where answers end.

Programs that serve a model find out where to stop in three places: the tokenizer's `eos_token`,
`generation_config.json`, and `eos_token_id` in `config.json`. All three are made to agree. Of the rest of the
tokenizer nothing changes but tokens that the model has no row for, which are left out: they could never be used, and
loaders that fit the embedding to the tokenizer would change its shape.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxft.hub.model_files import read_json

SETTINGS, SPECIALS = "tokenizer_config.json", "special_tokens_map.json"
TEXT_EOS = "jaxft_text_eos"
"""Key of tokenizer_config.json: the token that ended plain texts in training, where `eos_token` ends answers."""

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


def set_eos_token(directory: Path, token: str, before: str | None) -> None:
    """Make `token` the tokenizer's `eos_token` in place of `before`.

    A pad token that is `token` becomes `before`: one token for both would hide the end of an answer from programs that
    mask padding.
    """
    for name in (SETTINGS, SPECIALS):
        path = directory / name
        if not path.exists() and name == SPECIALS:
            continue
        settings = read_json(path) if path.exists() else {}
        settings["eos_token"] = token
        if before is not None and _content(settings.get("pad_token")) == token:
            settings["pad_token"] = before
        if before is not None and name == SETTINGS:
            settings.setdefault(TEXT_EOS, before)
        write_json(path, settings)


def forget_text_eos(directory: Path) -> None:
    """Drop what an earlier export remembers: texts now end with the tokenizer's `eos_token`."""
    path = directory / SETTINGS
    settings = read_json(path) if path.exists() else {}
    if settings.pop(TEXT_EOS, None) is not None:
        write_json(path, settings)


def set_stop_ids(directory: Path, ids: Sequence[int], rows: int) -> None:
    """Name these tokens in generation_config.json, and in config.json where that names any; other settings stay.

    Without one, neither names any.

    Args:
        rows: of the embedding; a `pad_token_id` beyond is taken out.
    """
    value = ids[0] if len(ids) == 1 else list(ids)
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        settings = read_json(path) if path.exists() else {}
        for part in (settings, settings.get("text_config")) if name == "config.json" else (settings,):
            if not isinstance(part, dict):
                continue
            if ids and (name != "config.json" or part.get("eos_token_id") is not None):
                part["eos_token_id"] = value
            elif not ids:
                part.pop("eos_token_id", None)
            if isinstance(part.get("pad_token_id"), int) and part["pad_token_id"] >= rows:
                del part["pad_token_id"]
        if path.exists() or (settings and name != "config.json"):
            write_json(path, settings)


def drop_tokens_beyond(directory: Path, rows: int) -> list[str]:
    """Leave out the added tokens that have no row in an embedding of `rows` rows; returns them.

    A pad token among them is replaced by the end-of-text token, which is what programs take that find none.
    """
    path = directory / "tokenizer.json"
    whole = read_json(path) if path.exists() else {}
    added = whole.get("added_tokens") or []
    vocabulary = (whole.get("model") or {}).get("vocab") or {}
    beyond = {one["content"] for one in added if one["id"] >= rows}
    settings = read_json(directory / SETTINGS) if (directory / SETTINGS).exists() else {}
    decoder = settings.get("added_tokens_decoder") or {}
    beyond |= {one["content"] for index, one in decoder.items() if int(index) >= rows}
    if whole:
        known = {*(vocabulary if isinstance(vocabulary, dict) else (entry[0] for entry in vocabulary))}
        known |= {one["content"] for one in added}
        ids = [*vocabulary.values()] if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        following = max([*ids, *(one["id"] for one in added)], default=-1) + 1
        for token in _named(settings):  # a token that tokenizer.json lacks is appended where it is loaded
            if token not in known:
                beyond |= {token} if following >= rows else set()
                following += 1
    if not beyond:
        return []
    if added:
        whole["added_tokens"] = [one for one in added if one["content"] not in beyond]
        if (whole.get("padding") or {}).get("pad_token") in beyond:
            whole["padding"] = None
        write_json(path, whole)
    for name in (SETTINGS, SPECIALS):
        if (directory / name).exists():
            write_json(directory / name, _without(read_json(directory / name), beyond))
    path = directory / "added_tokens.json"
    if path.exists():
        write_json(path, {token: index for token, index in read_json(path).items() if index < rows})
    return sorted(beyond)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _content(token: Any) -> str | None:
    """The text of a token, which files give alone or with its properties."""
    return token.get("content") if isinstance(token, dict) else token


def _named(settings: dict[str, Any]) -> list[str]:
    """The special tokens that the settings name, in the order in which they are added."""
    named = [_content(settings.get(role)) for role in _ROLES]
    for option in _LISTS:
        more = settings.get(option) or []
        named += map(_content, more.values() if isinstance(more, dict) else more)
    return list(dict.fromkeys(token for token in named if token is not None))


def _without(settings: dict[str, Any], gone: set[str]) -> dict[str, Any]:
    for role in _ROLES:
        if _content(settings.get(role)) in gone:
            del settings[role]
            if role == "pad_token" and settings.get("eos_token") is not None:
                settings[role] = _content(settings["eos_token"])
    for option in _LISTS:
        if isinstance(more := settings.get(option), list):
            settings[option] = [token for token in more if _content(token) not in gone]
        elif isinstance(more, dict):
            settings[option] = {key: token for key, token in more.items() if _content(token) not in gone}
    if decoder := settings.get("added_tokens_decoder"):
        settings["added_tokens_decoder"] = {k: one for k, one in decoder.items() if one["content"] not in gone}
    return settings
