"""Lists and objects inside a record, in the ways that files store them.

JSON may stand as text in a column. Older versions of `datasets` store a list of objects as an object of lists. Arrow
gives every object all fields that any of them has, and the missing ones are null.
"""

from typing import Any

from jaxft.data.strict_json import parse_json, reason

_LITERAL = ("default", "const", "enum", "examples")  # keys of a JSON schema under which null is a value
_NAMES = ("properties", "patternProperties", "$defs", "definitions")  # keys of a JSON schema that hold schemas by name


def listed(value: Any, what: str) -> Any:
    """JSON text as what it says; an object of lists of one length as the list of objects it stores."""
    value = parsed(value, what)
    columns = list(value.values()) if isinstance(value, dict) else []
    if columns and all(isinstance(column, list) for column in columns) and len(set(map(len, columns))) == 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return list(value) if isinstance(value, tuple) else value


def parsed(value: Any, what: str) -> Any:
    """The list or object that JSON text says; any other value as it is, and blank text and "null" as None."""
    if not isinstance(value, str):
        return value
    if value.strip() in ("", "null"):
        return None
    if value.lstrip()[0] not in "[{":
        return value
    try:
        return parse_json(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is text, but {reason(error)}") from None


def without_nulls(value: Any, *, names: bool = False) -> Any:
    """Without the keys that are null, at any depth; but null may be the constant or default of what takes null.

    `names`: the keys of this object are names that its writer chose, not words of a JSON schema.
    """
    if isinstance(value, dict):
        literal = () if names else _LITERAL
        return {
            key: part if key in literal else without_nulls(part, names=key in _NAMES and not names)
            for key, part in value.items()
            if part is not None or (key in ("const", "default") and key in literal and takes_null(value))
        }
    return [without_nulls(part) for part in value] if isinstance(value, list | tuple) else value


def takes_null(schema: Any) -> bool:
    """Whether a JSON schema allows null, or does not say."""
    if not isinstance(schema, dict) or schema.get("nullable") or "$ref" in schema:
        return True
    types, values = schema.get("type"), schema.get("enum")
    choices = [*(schema.get("anyOf") or []), *(schema.get("oneOf") or [])]
    if not (types or values or choices):
        return True
    return types == "null" or "null" in _list(types) or None in _list(values) or any(map(takes_null, choices))


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []


def kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    kinds = {dict: "an object", list: "a list", tuple: "a list", str: "text", bool: "true or false", int: "a number"}
    kinds |= {float: "a number", bytes: "bytes (store them as text)", type(None): "null"}
    return kinds.get(type(value), f"a {type(value).__name__}")
