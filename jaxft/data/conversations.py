"""Parses conversations with any known keys and role names into one form, and checks them before rendering.

The order of roles is: at most one system message, then a user message, then answers and questions in turn.
An assistant message that calls tools is followed by tool messages with the results. The last question may have
no answer.

A null is an absent value, in tools and messages at any depth. Only what a tool's schema lets be null may be: an
argument of a call that is required, may be null, or of which nothing is known.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxft.data.events import RESULT_OF_NO_CALL, Event, part_key_not_read, role_read_as
from jaxft.data.nested import kind, listed, parsed, without_nulls
from jaxft.data.tool_calls import from_function_call, is_given, parse_tool_calls

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
    "tool_response": "tool",
}
_CALLS = ("function_call", "tool_call")  # roles whose content is the call, as JSON text
_MAY_FOLLOW = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "assistant with tool calls": ("tool",),
    "tool": ("assistant", "tool"),
}
#: Keys that say whether a turn is learned, as `_plain` has them, and the value that says it is.
_LEARNED_IF = {
    "weight": True,
    "loss_weight": True,
    "loss": True,
    "train": True,
    "trainable": True,
    "training": True,
    "train_on_turn": True,
    "learn": True,
    "learnable": True,
    "supervised": True,
    "loss_mask": True,
    "loss_scale": True,
    "mask": False,
    "masked": False,
    "is_masked": False,
    "ignore": False,
    "ignore_loss": False,
    "no_loss": False,
}
_TRUTH = {"1": True, "true": True, "0": False, "false": False}
_REASONING = frozenset(
    """
    reasoning reasoning_content reasoning_details reasoning_text reasoning_trace thinking thinking_content
    thinking_blocks thought thoughts internal_thoughts think cot chain_of_thought rationale scratchpad
    """.split()  # noqa: SIM905
)
_MEDIA = ("images", "image", "audio", "audios", "videos", "video")
_READ = {"role", "content", "from", "value", "tool_calls", "tool_call_id", "function_call"}
_TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class Message:
    """One turn. `supervised` says that the model learns it; only assistant turns can be.

    `tool_calls` are OpenAI's: `{"id", "type": "function", "function": {"name", "arguments": object}}`. `extra` holds
    all other keys, which the chat template sees as it would in transformers.
    """

    role: str
    content: str
    supervised: bool = False
    tool_calls: tuple[dict, ...] = ()
    tool_call_id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    events: tuple[Event, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Conversation:
    """Turns, the tools on offer (OpenAI's function schemas), and where the example came from."""

    messages: tuple[Message, ...]
    tools: tuple[dict, ...] = ()
    origin: str = field(default="", compare=False)
    events: tuple[Event, ...] = field(default=(), compare=False)


def parse_text(value: Any, what: str) -> str:
    """`value`, if it is text that is not blank; `what` names it in the ValueError."""
    if value is None:
        raise ValueError(f"{what} is missing")
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, not {kind(value)}")
    if not value.strip():
        raise ValueError(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half of a surrogate pair, {value[error.start]!r}") from None
    return value


def parse_messages(turns: Any, tools: Sequence[dict] = ()) -> tuple[Message, ...]:
    """Messages from a list of `{role, content}` or `{from, value}` objects, in checked order.

    The list may be JSON text, or an object of lists, as older versions of `datasets` store a list of objects. `tools`
    tell which null arguments are values.
    """
    turns = listed(turns, "the messages")
    if not isinstance(turns, list):
        raise ValueError(f"the messages must be a list, not {kind(turns)}")
    if not turns:
        raise ValueError("the list of messages is empty")
    messages: list[Message] = []
    waiting: list[str] = []  # ids of tool calls without a result so far
    calls = 0
    for number, turn in enumerate(turns, 1):
        try:
            message = _parse_message(turn, calls, waiting, tools)
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


def with_last_answer(conversation: Conversation) -> Conversation:
    """The same conversation, but the model learns only the last answer, if that answer was supervised."""
    last = max(i for i, message in enumerate(conversation.messages) if message.role == "assistant")
    messages = (
        replace(message, supervised=message.supervised and i == last) for i, message in enumerate(conversation.messages)
    )
    return replace(conversation, messages=tuple(messages))


def _parse_message(turn: Any, calls: int, waiting: list[str], tools: Sequence[dict]) -> Message:
    turn = parsed(turn, "a message")
    if not isinstance(turn, dict):
        raise ValueError(f"must be an object, not {kind(turn)}")
    turn = {key: value for key, value in turn.items() if value is not None}
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    if turn.get(role_key) is None:
        raise ValueError(f"no `role` (nor `from`); there are: {', '.join(turn) or 'no keys'}")
    given = turn[role_key]
    name = given.strip().lower() if isinstance(given, str) else given
    if not isinstance(name, str) or name not in ROLES:
        raise ValueError(f"unknown role {given!r}; known roles: {', '.join(ROLES)}")
    _refuse_what_is_not_text(turn)
    role, content = ROLES[name], _content(turn, content_key)
    events: list[Event] = [role_read_as(name, role)] if name == "developer" else []
    if isinstance(content, list):
        content, unread = _join_parts(content)
        events += [part_key_not_read(key) for key in unread]
    called = listed(turn.get("tool_calls"), "`tool_calls`") or []
    if legacy := turn.get("function_call"):
        called = [*called, {"function": legacy}]
    if name in _CALLS and not called:
        content, called = None, from_function_call(content)
    if called and role != "assistant":
        raise ValueError(f"tool calls by role {given}; only the assistant calls tools")
    tool_calls = parse_tool_calls(called, calls, tools, events)
    if not content and (tool_calls or (role == "tool" and content is not None)):
        content = ""
    elif content is None:
        raise ValueError(f"`{content_key}` of the {given} message is missing; there are: {', '.join(turn)}")
    else:
        content = parse_text(content, f"`{content_key}` of the {given} message")
    answers = turn.get("tool_call_id") if role == "tool" else None
    if role == "tool" and waiting:
        if answers not in waiting:
            if answers is not None and not is_given(waiting[0]):
                events.append(RESULT_OF_NO_CALL)
            answers = waiting[0]
        waiting.remove(answers)
    unread = {key: value for key, value in turn.items() if key not in _READ and _plain(key) not in _LEARNED_IF}
    extra = {key: without_nulls(value) for key, value in unread.items() if value not in ("", [], {})}
    return Message(role, content, _is_supervised(turn, role), tool_calls, answers, extra, tuple(events))


def _content(turn: dict, key: str) -> Any:
    other = {"content": "value", "value": "content"}[key]
    if key not in turn:
        return turn.get(other)
    if other in turn and turn[other] != turn[key]:
        raise ValueError("`content` and `value` are both given and differ; keep one")
    return turn[key]


def _refuse_what_is_not_text(turn: dict) -> None:
    if found := [key for key in turn if _plain(key) in _REASONING and turn[key]]:
        raise ValueError(
            f"reasoning in `{found[0]}` cannot be learned yet; remove the key, or write the reasoning into the content "
            "where the chat template shows it there (as <think>...</think>)"
        )
    if found := [key for key in _MEDIA if turn.get(key)]:
        raise ValueError(f"`{found[0]}` is not supported; only text content and `tool_calls` are")


def _is_supervised(turn: dict, role: str) -> bool:
    """Whether the turn is learned: every answer is, unless a mark such as `weight: 0` or `train: false` says no."""
    said: dict[str, bool] = {}
    for key, given in turn.items():
        positive = _LEARNED_IF.get(_plain(key))
        if positive is None or given == "":
            continue
        value = _TRUTH.get(str(given).strip().lower().removesuffix(".0"))
        if value is None:
            raise ValueError(
                f"`{key}` is {given!r}; a turn is learned ({_yes(positive)}) or not ({_yes(not positive)})"
            )
        if value == positive and positive and role != "assistant":
            raise ValueError(
                f"`{key}` is {given!r} on a {role} message; only assistant messages can be learned. "
                "To learn all of the text, set `assistant_only_loss: false` and remove the marks"
            )
        said[key] = value == positive
    if len(set(said.values())) > 1:
        raise ValueError(
            f"{' and '.join(f'`{key}`' for key in said)} contradict each other on whether the turn is learned"
        )
    return role == "assistant" and all(said.values())


def _plain(key: str) -> str:
    return key.lower().replace("-", "_")


def _yes(value: bool) -> str:
    return "1 or true" if value else "0 or false"


def _join_parts(parts: list) -> tuple[str, list[str]]:
    """The text of all parts, and the keys of parts that are not read."""
    texts, unread = [], []
    for part in parts:
        part = {"text": part} if isinstance(part, str) else part
        type_ = part.get("type", "text") if isinstance(part, dict) else kind(part)
        if type_ in ("thinking", "reasoning", "redacted_thinking"):
            raise ValueError(f"content of type {type_!r} cannot be learned yet; remove such parts, or the example")
        if type_ not in _TEXT_PARTS:
            raise ValueError(f"content of type {type_!r} is not supported; only parts of type 'text' are")
        texts.append(parse_text(part.get("text", part.get("value")), "the text of a content part"))
        unread += [key for key, value in part.items() if key not in ("type", "text", "value") and value]
    return "".join(texts), unread
