"""How a conversation is given to a chat template.

As transformers gives it: every key of a message, a null content where there is none. But templates disagree on what a
call of a tool looks like. Some want the arguments as an object and some as JSON text, some a null content beside a call
and some an empty one, and Mistral's want ids of nine letters. Which form a template wants is found once, by a
conversation whose call it must show.
"""

import json
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

from jaxft.data.conversations import Message
from jaxft.data.template_process import TemplateError

_ID_LENGTH = 9
_ID = "call_R7wq2ZkX0bNfT4sYvLmC9dJe"  # as OpenAI's API gives them
_WORD = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
_TOOL = {"type": "function", "function": {"name": "look_up", "description": "Look up.", "parameters": _WORD}}
CALLED = "heron"
#: A call whose argument is `CALLED`.
CALL = (
    Message("user", "question"),
    Message(
        "assistant",
        "",
        tool_calls=({"id": _ID, "type": "function", "function": {"name": "look_up", "arguments": {"word": CALLED}}},),
    ),
)


class CallForm(NamedTuple):
    """What stands for an absent content beside a call, how arguments are written, and whether ids are."""

    content: str | None = None
    arguments_as_text: bool = False
    short_ids: bool = False


def find_call_form(render: Callable[[dict], str]) -> CallForm:
    """The first form in which a template shows a call, or else the first that it accepts."""
    messages = (*CALL, Message("tool", "result", tool_call_id=_ID), Message("assistant", "answer"))
    accepted = []
    for short_ids, as_text, content in product((False, True), (False, True), (None, "")):
        form = CallForm(content, as_text, short_ids)
        try:
            text = render(job(messages, [_TOOL], False, form))
        except TemplateError:
            continue
        if "None" in text:  # a null content, spelt
            continue
        if CALLED in text and f'\\"{CALLED}' not in text:
            return form
        accepted.append(form)
    return accepted[0] if accepted else CallForm()


def job(messages: Sequence[Message], tools: Sequence[dict], add_generation_prompt: bool, form: CallForm) -> dict:
    """The variables of a template."""
    ids = [call["id"] for message in messages for call in message.tool_calls]
    short = {}
    if form.short_ids and not all(_is_short(identity) for identity in ids):
        short = {identity: f"call{number:05d}" for number, identity in enumerate(dict.fromkeys(ids))}
    return {
        "messages": [_turn(message, form, short) for message in messages],
        "tools": list(tools) or None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }


def rewrites_ids(messages: Sequence[Message], form: CallForm) -> bool:
    """Whether `job` gives other ids than the messages have."""
    return form.short_ids and not all(_is_short(call["id"]) for message in messages for call in message.tool_calls)


def _turn(message: Message, form: CallForm, short: dict[str, str]) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content, **message.extra}
    if message.tool_calls:
        turn["content"] = message.content or form.content
        turn["tool_calls"] = [_call(call, form, short) for call in message.tool_calls]
    if message.tool_call_id:
        turn["tool_call_id"] = short.get(message.tool_call_id, message.tool_call_id)
    return turn


def _call(call: dict, form: CallForm, short: dict[str, str]) -> dict:
    function = call["function"]
    if form.arguments_as_text:
        function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return {**call, "id": short.get(call["id"], call["id"]), "function": function}


def _is_short(identity: str) -> bool:
    return isinstance(identity, str) and len(identity) == _ID_LENGTH and identity.isalnum()
