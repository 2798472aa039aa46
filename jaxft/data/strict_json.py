"""Parses JSON strictly by the standard: a tolerant parser could train on data that nobody meant.

Beyond the syntax, three things are faults: NaN and Infinity; a key that is there twice in an object; half of a
surrogate pair (`\\ud83d` alone), which is no character and cannot be tokenized.
"""

import json
from typing import Any

BLANK = " \t\r\n"


def parse_json(text: str) -> Any:
    """The value that `text` holds; ValueError for anything that is not one value."""
    text = text.strip(BLANK)
    value, end = parse_at(text, 0)
    if end != len(text):
        more = text[end:].lstrip(BLANK)
        column = len(text) - len(more) + 1
        raise ValueError(f"there is more after the end of the value, from column {column} on: {more[:20]!r}")
    return value


def parse_at(text: str, position: int) -> tuple[Any, int]:
    """The value that begins at `position`, and where it ends.

    Raises:
        json.JSONDecodeError: the syntax is broken: where the value ends cannot be told.
        RecursionError: too deeply nested: the same.
        ValueError: the syntax is right; what it says is not.
    """
    value, end = _STRICT.raw_decode(text, position)
    if any(text.find(half, position, end) >= 0 for half in ("\\ud", "\\uD")):
        _refuse_half_pairs(value)
    return value, end


def end_of(text: str, position: int) -> int:
    """Where the value that begins at `position` ends, if only its syntax is right."""
    return _TOLERANT.raw_decode(text, position)[1]


def reason(error: ValueError | RecursionError) -> str:
    """An error of these functions, in words."""
    if isinstance(error, RecursionError):
        return "too deeply nested"
    if "int_max_str_digits" in str(error):
        return "a number of more digits than can be read"
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    quoted = error.doc[error.pos : error.pos + 1] == "'"
    return f"not JSON: {error.msg} (column {error.colno})" + (
        "; JSON has double quotes, not single ones" if quoted else ""
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return values


def _no_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _refuse_half_pairs(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"\\u{ord(half):04x} is half of a surrogate pair, not a character") from None


_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
_TOLERANT = json.JSONDecoder(parse_int=str, parse_float=str)
