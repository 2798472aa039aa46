"""Conversations in one form, whatever keys and role names they came with, checked before they are rendered.

The order of roles is: at most one system message, then a user message, then answers and questions in turn.
An assistant message that calls tools is followed by tool messages with the results. A last question may stand
unanswered.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxft.data.sources import parse_json

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_MAY_FOLLOW = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "assistant with tool calls": ("tool",),
    "tool": ("assistant", "tool"),
}
_UNSUPPORTED = ("reasoning_content", "thinking", "function_call", "images", "audio", "audios", "videos")


@dataclass(frozen=True)
class Message:
    """One turn. `supervised` says that the model learns it; only assistant turns can be.

    `tool_calls` are OpenAI's: `{"id", "type": "function", "function": {"name", "arguments": object}}`.
    """

    role: str
    content: str
    supervised: bool = False
    tool_calls: tuple[dict, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Turns, the tools on offer (OpenAI's function schemas), and where the example came from."""

    messages: tuple[Message, ...]
    tools: tuple[dict, ...] = ()
    origin: str = field(default="", compare=False)


def parse_text(value: Any, what: str) -> str:
    """`value`, if it is text that is not blank; `what` names it in the ValueError."""
    if value is None:
        raise ValueError(f"{what} is missing")
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, not {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half of a surrogate pair, {value[error.start]!r}") from None
    return value


def parse_messages(turns: Any) -> tuple[Message, ...]:
    """Messages from a list of `{role, content}` or `{from, value}` objects, in checked order."""
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise ValueError(f"the messages must be a list, not {type(turns).__name__}")
    if not turns:
        raise ValueError("the list of messages is empty")
    messages: list[Message] = []
    waiting: list[str] = []  # ids of tool calls without a result so far
    calls = 0
    for number, turn in enumerate(turns, 1):
        try:
            message = _parse_message(turn, calls, waiting)
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
        calls += len(message.tool_calls)
        waiting += [call["id"] for call in message.tool_calls]
        messages.append(message)
    check_order(messages)
    return tuple(messages)


def check_order(messages: Sequence[Message]) -> None:
    """Raise ValueError where a role cannot follow the one before, or if nothing is answered."""
    before = "start"
    for number, message in enumerate(messages, 1):
        if message.role not in _MAY_FOLLOW[before]:
            allowed = " or ".join(_MAY_FOLLOW[before])
            place = "comes first" if before == "start" else f"follows {before}"
            raise ValueError(f"message {number}: role {message.role} {place}; expected {allowed}")
        before = "assistant with tool calls" if message.tool_calls else message.role
    if all(message.role != "assistant" for message in messages):
        raise ValueError("no assistant message: there is nothing to learn from")


def parse_tools(tools: Any) -> tuple[dict, ...]:
    """Function schemas from a list, or from a list written as JSON text; bare functions are wrapped."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = parse_json(tools)
        except ValueError as error:
            raise ValueError(f"`tools` is not JSON: {error}") from None
    tools = tools or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("`tools` must be a list of function schemas")
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    for tool in tools:
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise ValueError(f"a tool without a name: {json.dumps(tool)[:200]}")
    return tuple(tools)


def _parse_message(turn: Any, calls: int, waiting: list[str]) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"must be an object, not {type(turn).__name__}")
    role_key, content_key = ("role", "content") if turn.get("from") is None else ("from", "value")
    if turn.get(role_key) is None:
        raise ValueError(f"no `role` (nor `from`); there are: {', '.join(turn) or 'no keys'}")
    given = turn[role_key]
    if not isinstance(given, str) or given not in ROLES:
        raise ValueError(f"unknown role {given!r}; known roles: {', '.join(ROLES)}")
    if found := [key for key in _UNSUPPORTED if turn.get(key)]:
        raise ValueError(f"`{found[0]}` is not supported; only text content and `tool_calls` are")
    role, content, tool_calls = ROLES[given], turn.get(content_key), turn.get("tool_calls") or []
    if isinstance(content, list):
        content = _join_parts(content)
    if given == "function_call":
        content, tool_calls = None, _from_function_call(content)
    if tool_calls and role != "assistant":
        raise ValueError(f"tool calls by role {given}; only the assistant calls tools")
    tool_calls = _parse_tool_calls(tool_calls, calls)
    if not content and (tool_calls or (role == "tool" and content is not None)):
        content = ""
    else:
        content = parse_text(content, f"`{content_key}` of the {given} message")
    answers = turn.get("tool_call_id") if role == "tool" else None
    if role == "tool" and waiting:
        answers = answers or waiting[0]
        waiting[:] = [call for call in waiting if call != answers]
    return Message(role, content, _is_supervised(turn, role), tool_calls, answers)


def _is_supervised(turn: dict, role: str) -> bool:
    """OpenAI's `weight`, or `loss_weight`: 1 to learn an assistant turn (the default), 0 not to."""
    given = {key: turn[key] for key in ("weight", "loss_weight") if turn.get(key) is not None}
    for key, weight in given.items():
        if weight not in (0, 1):
            raise ValueError(f"`{key}` is {weight!r}; a turn is learned (1) or not (0)")
        if weight and role != "assistant":
            raise ValueError(f"`{key}` is 1 on a {role} message; only assistant messages can be learned")
    return role == "assistant" and all(given.values())


def _join_parts(parts: list) -> str:
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise ValueError(f"content of type {kind!r} is not supported; only parts of type 'text' are")
        texts.append(parse_text(part.get("text", part.get("value")), "the text of a content part"))
    return "".join(texts)


def _from_function_call(content: Any) -> list[dict]:
    """ShareGPT's function_call: one `{name, arguments}` or a list of them, as JSON text."""
    try:
        called = parse_json(parse_text(content, "the function call"))
    except ValueError as error:
        raise ValueError(f"the function call is not JSON: {error}") from None
    return [{"function": call} for call in (called if isinstance(called, list) else [called])]


def _parse_tool_calls(tool_calls: Any, before: int) -> tuple[dict, ...]:
    """OpenAI's form with the arguments as an object, which templates expect. Calls without an id get one of
    nine letters and digits, the only form that some templates accept."""
    if not isinstance(tool_calls, list):
        raise ValueError(f"`tool_calls` must be a list, not {type(tool_calls).__name__}")
    parsed = []
    for call in tool_calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError("a tool call without a function name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = parse_json(arguments)
            except ValueError as error:
                raise ValueError(f"the arguments of {function['name']} are not JSON: {error}") from None
        if not isinstance(arguments, dict):
            raise ValueError(f"the arguments of {function['name']} must be an object")
        identity = call.get("id") or f"call{before + len(parsed):05d}"
        function = {"name": function["name"], "arguments": arguments}
        parsed.append({"id": identity, "type": "function", "function": function})
    return tuple(parsed)
