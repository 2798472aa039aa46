"""Describes the faults of a config in lines that a person can act on.

The lines say where the key stands, in the file or on the command line, call it what the user called it, and never
repeat what may be a credential.
"""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import ValidationError

from jaxft.config import SECRET, SECRET_LIKE, Config
from jaxft.config_names import OF_A_SOURCE, advice

COMMAND_LINE = "command line"
_PHRASES = {
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "invalid_key": "must be a string, as all keys",
}

KeyPath = tuple[str | int, ...]  # ("datasets", 0, "weight")


def explain(
    error: ValidationError,
    tree: dict[str, Any],
    file: str,
    spelt: dict[str, str],
    overridden: list[KeyPath],
    other_names: Sequence[str],
) -> Iterator[str]:
    """A line per problem.

    Args:
        tree: the checked config; `error` holds the faults that the schema found in it.
        file: what stands for it in the lines.
        spelt: our key -> the other name that the user gave it.
        overridden: what the command line set.
        other_names: all names that keys may have besides ours.
    """
    faults: dict[KeyPath, list[Any]] = {}
    for fault in error.errors(include_url=False):
        faults.setdefault(_locate(tree, fault), []).append(fault)
    for path, found in faults.items():
        if any(_within(deeper, path) and deeper != path for deeper in faults):
            continue  # the other branch of a union: what stands deeper is what was meant
        where = file
        if any(_within(path, key) for key in overridden):
            where = COMMAND_LINE
        elif any(_within(key, path) for key in overridden):
            where = f"{file} with the {COMMAND_LINE}"
        if not path:  # contradictions between keys, which stand in backticks
            for line in str(found[0]["ctx"]["error"]).splitlines():
                yield f"{where}: " + re.sub(r"`(\w+)`", lambda key: _called((key[1],), spelt), line)
            continue
        yield f"{where}: {_called(path, spelt)}: {_reason(path, found, other_names)}"


def _within(path: KeyPath, whole: KeyPath) -> bool:
    return path[: len(whole)] == whole


def _locate(tree: dict[str, Any], fault: Any) -> KeyPath:
    """Where in the config the fault lies: pydantic's location without the names of union branches."""
    path: KeyPath = ()
    node: Any = tree
    for part in fault["loc"]:
        if part in node if isinstance(node, dict) else isinstance(node, list) and isinstance(part, int):
            path, node = (*path, part), node[part]
        elif fault["type"] == "missing":
            path = (*path, part)
    return path


def _reason(path: KeyPath, found: list[Any], other_names: Sequence[str]) -> str:
    """What is wrong with the value at `path`; there are several faults where no branch of a union fits."""
    kind, value, last = found[0]["type"], found[0]["input"], str(path[-1])
    if value is None and ":" in last:  # {fsdp:8}, which YAML reads as {"fsdp:8": null}
        return "lacks a space after the colon"
    if kind == "extra_forbidden" and len(path) == 3 and last in OF_A_SOURCE:
        return f"has no counterpart here: {OF_A_SOURCE[last]}"
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(last, _names_in(path[:-1], other_names), n=1)
        return f"unknown key; did you mean `{near[0]}`?" if near else "unknown key"
    if kind == "missing":
        return "is required"
    if kind == "value_error":
        return str(found[0]["ctx"]["error"]) + ("" if isinstance(value, list | dict) else got(value))
    phrases = (_PHRASES.get(f["type"], f["msg"].replace("Input should be", "must be")) for f in found)
    wrong = " or ".join(dict.fromkeys(phrases)).replace(" or must be ", " or ") + got(value)
    return "; ".join(filter(None, (wrong, advice(last, value))))


def _names_in(path: KeyPath, other_names: Sequence[str]) -> list[str]:
    section: Any = Config
    for part in path:
        section = get_args(section)[0] if isinstance(part, int) else section.model_fields[part].annotation
    return [*section.model_fields, *(() if path else other_names)]


def _called(path: KeyPath, spelt: dict[str, str]) -> str:
    """The key as the user wrote it, with our own name where that is another."""
    name = dotted((spelt.get(path[0], path[0]), *path[1:]))
    return name if name == dotted(path) else f"{name} ({path[0]})"


def dotted(path: KeyPath) -> str:
    """The key in one text, without parts that may be secret."""
    return ".".join("***" if SECRET.search(str(part)) else str(part) for part in path)


def got(value: Any) -> str:
    """The end of a complaint about a value."""
    return f" (got {show(value)})"


def show(value: Any) -> str:
    """A value in a few words, without what may be secret."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    if isinstance(value, str) and SECRET_LIKE.search(value):
        return "a text not shown, as it may hold a secret"
    if isinstance(value, str) and len(value) > 80:
        return json.dumps(value[:80], ensure_ascii=False) + "..."
    if value is None or isinstance(value, str | bool | int | float):
        return json.dumps(value, ensure_ascii=False)
    return f"a {type(value).__name__}"
