"""Tools and their calls in OpenAI's form, however a record stores them."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from jaxft.data.events import FILLED_NULLS, Event, call_key_not_read
from jaxft.data.nested import kind, listed, parsed, takes_null, without_nulls
from jaxft.data.strict_json import parse_json, reason

_GIVEN = "call{:05d}"  # the id of a call that has none


def parse_tools(tools: Any) -> tuple[tuple[dict, ...], tuple[Event, ...]]:
    """Function schemas, and what was left out of them.

    They come as a list, or as JSON text, whole or in parts. Bare functions are wrapped.
    """
    tools = listed(tools, "`tools`") or []
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise ValueError(f"`tools` must be a list of function schemas, not {kind(tools)}")
    found = []
    for tool in tools:
        tool = parsed(tool, "a tool")
        if not isinstance(tool, dict):
            raise ValueError(f"a tool must be a function schema, not {kind(tool)}")
        if tool.get("function") is None:
            tool = {"type": "function", "function": {key: tool[key] for key in tool if key not in ("type", "function")}}
        function = parsed(tool["function"], "a tool's function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"a tool without a name: {json.dumps(tool, default=str)[:200]}")
        if isinstance(function.get("parameters"), str):
            parameters = parsed(function["parameters"], f"the parameters of {function['name']}")
            function = {**function, "parameters": parameters}
        found.append({**tool, "function": function})
    kept = tuple(without_nulls(tool) for tool in found)
    return kept, (FILLED_NULLS,) if list(kept) != found else ()


def from_function_call(content: Any) -> list[dict]:
    """ShareGPT's function_call: one `{name, arguments}` or a list of them, as JSON text."""
    if isinstance(content, str):
        try:
            content = parse_json(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the function call is {reason(error)}") from None
    called = content if isinstance(content, list) else [content]
    return [call if isinstance(call, dict) and "function" in call else {"function": call} for call in called]


def parse_tool_calls(tool_calls: Any, before: int, tools: Sequence[dict], events: list[Event]) -> tuple[dict, ...]:
    """OpenAI's form with the arguments as an object. Calls without an id get one of nine letters and digits."""
    if not isinstance(tool_calls, list):
        raise ValueError(f"`tool_calls` must be a list, not {kind(tool_calls)}")
    found: list[dict] = []
    for call in tool_calls:
        call = parsed(call, "a tool call")
        function = parsed(call.get("function"), "a tool call") if isinstance(call, dict) else None
        if function is None and isinstance(call, dict) and isinstance(call.get("name"), str):
            function = call  # bare {name, arguments}, as some servers write them
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError("a tool call without a function name")
        name, arguments = function["name"], function.get("arguments")
        arguments = {} if arguments in (None, "") else arguments
        if isinstance(arguments, str):
            try:
                arguments = parse_json(arguments)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"the arguments of {name} are {reason(error)}") from None
        if not isinstance(arguments, dict):
            raise ValueError(f"the arguments of {name} must be an object")
        kept = _meant(arguments, _parameters(name, tools))
        if kept != arguments:
            events.append(FILLED_NULLS)
        unread = [*(set(call) - {"id", "type", "function", "name", "arguments", "index"})]
        unread += [*(set(function) - {"name", "arguments"} if function is not call else ())]
        events += [call_key_not_read(key) for key in sorted(unread) if (call.get(key) or function.get(key))]
        identity = call.get("id") or _GIVEN.format(before + len(found))
        found.append({"id": identity, "type": "function", "function": {"name": name, "arguments": kept}})
    return tuple(found)


def is_given(identity: str) -> bool:
    """Whether a call had no id and got this one here."""
    return re.fullmatch(r"call\d{5}", str(identity)) is not None


def _parameters(name: str, tools: Iterable[dict]) -> Any:
    """The schema of a tool's arguments; None where the tool is not known."""
    return next((tool["function"].get("parameters") for tool in tools if tool["function"]["name"] == name), None)


def _meant(value: Any, schema: Any) -> Any:
    """Without the nulls that stand for absent fields, at any depth: of names that the schema does not have, or that it
    neither requires nor lets be null. Where it does not say what an object holds, nulls stay."""
    if not isinstance(schema, dict):
        return value
    if isinstance(value, list):
        return [_meant(part, schema.get("items")) for part in value]
    properties = schema.get("properties")
    if not isinstance(value, dict) or not isinstance(properties, dict):
        return value
    required = schema.get("required") or ()
    return {
        key: _meant(part, properties.get(key))
        for key, part in value.items()
        if part is not None or (key in properties and (key in required or takes_null(properties[key])))
    }
