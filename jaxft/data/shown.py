"""What a conversation says and its rendered text does not show.

A chat template may leave out what it does not know: the reasoning before an answer, a system message, a field of a
tool, a key of a message. What is left out is not learned and not seen. Each function names it as an event, or refuses
the conversation where the rest would teach something else: a tool that is not shown, a call that is not shown.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jaxft.data.conversations import Message
from jaxft.data.events import (
    ARGUMENTS_LOST,
    BESIDE_CALL,
    CONTENT_CUT,
    EMPTY_THOUGHT,
    FOREIGN_MARKUP,
    MARKUP_SPELT,
    REASONING_LEFT_OUT,
    REASONING_LOST,
    Event,
    not_shown,
    thought_written_otherwise,
    tool_field_not_shown,
)
from jaxft.data.template_process import TemplateError

_TAG = "think|thinking|thought|reasoning"
_THOUGHT = re.compile(rf"(</?(?:{_TAG})>)")
_EMPTY_THOUGHT = re.compile(rf"<({_TAG})>\s*</\1>")
#: How models and data sets open a thought.
_OPENS = re.compile(
    rf"<(?:seed:)?(?:{_TAG}|reflection|scratchpad)>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|channel\|>analysis",
    re.I,
)
#: How chat templates write the borders of turns, in tokens of theirs or in letters; BOS and EOS at the ends only, as
#: <s> is a tag of HTML, too.
_MARKUP = re.compile(
    r"<\|[A-Za-z_]{2,30}\|>|<｜[^｜\s]{2,30}｜>|<(?:start|end)_of_turn>|<\|turn>|<turn\|>|\[/?INST\]|<</?SYS>>"
    r"|^\s*(?:<s>|<bos>)|(?:</s>|<eos>)\s*$"
)
#: Names by which a template reads tools and calls.
_TOOLS, _CALLS = re.compile(r"\btools\b"), re.compile(r"\btool_calls\b")
#: Fields of a tool that its form shows, or that only wrap others.
_STRUCTURE = {"type", "function", "parameters", "properties", "required", "items"}


def content_events(message: Message, shown: str, located: bool) -> Iterator[Event]:
    """What of a content is missing from `shown`, the text of its turn, or of all where no turn can be told.

    `located`: the template wrote the content somewhere, if not all of it.
    """
    pieces = _THOUGHT.split(message.content)
    for k in range(0, len(pieces), 2):
        piece = pieces[k].strip()
        if not piece or _says(shown, piece):
            continue
        if message.role == "assistant" and k + 1 < len(pieces) and pieces[k + 1].startswith("</"):
            yield REASONING_LOST if message.supervised else REASONING_LEFT_OUT
        else:
            yield CONTENT_CUT if located else BESIDE_CALL if message.tool_calls else not_shown(message.role)


def thought_events(message: Message, before_content: str, source: str) -> Iterator[Event]:
    """`before_content`: what is learned of a turn before its content; `source`: of the chat template."""
    if not message.supervised:
        return
    if _EMPTY_THOUGHT.search(before_content):
        yield EMPTY_THOUGHT
    if opened := _OPENS.match(message.content.lstrip()):
        tags = source.replace("</", "<")  # a template may name the end of a thought only
        own = _OPENS.search(tags)
        if own and opened[0] not in tags:
            yield thought_written_otherwise(opened[0], own[0])


def markup_events(text: str, special: re.Pattern, added: str, source: str = "") -> Iterator[Event]:
    """`special`: this tokenizer's special tokens; `added`: all that it has as one token; `source`: the template, of
    whose turns `text` is a part."""
    letters = markup_in_letters(text, added)
    if special.search(text) or any(found in source for found in letters):
        yield MARKUP_SPELT
    if any(found not in source for found in letters):
        yield FOREIGN_MARKUP


def markup_in_letters(text: str, added: str) -> list[str]:
    """Each border of a turn in a text that is not a token of this tokenizer, which has `added` as tokens."""
    return [found for match in dict.fromkeys(_MARKUP.findall(text)) if (found := match.strip()) not in added]


def before_thought(text: str) -> str:
    """The text up to where a thought begins."""
    found = _OPENS.search(text)
    return text[: found.start()] if found else text


def tool_events(tools: Sequence[dict], text: str, source: str) -> Iterator[Event]:
    """Raises TemplateError where a tool is not shown at all: by its name, which may stand in the text by accident."""
    for tool in tools:
        if tool["function"]["name"] not in text or not _TOOLS.search(source):
            raise TemplateError(
                f"the chat template does not show the tool {tool['function']['name']!r}; use a template "
                "that knows `tools`, or take them out of the data"
            )
        for key, value in _leaves(tool):
            if key not in _STRUCTURE and not _says(text, value) and key not in text:
                yield tool_field_not_shown(key)


def call_events(message: Message, turn: str, source: str) -> Iterator[Event]:
    """`turn`: what of the text is the message's. Raises TemplateError where a call is not shown at all."""
    names = [call["function"]["name"] for call in message.tool_calls]
    for call in message.tool_calls:
        if turn.count(name := call["function"]["name"]) < names.count(name) or not _CALLS.search(source):
            which = "the" if names.count(name) == 1 else "every"
            raise TemplateError(
                f"the chat template does not show {which} call of {name!r}; use a template that knows `tool_calls`, "
                "or take such conversations out of the data"
            )
        arguments = call["function"]["arguments"]
        if not all(key in turn for key in arguments) or not all(_says(turn, value) for _, value in _leaves(arguments)):
            yield ARGUMENTS_LOST


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(nearest key, value) of all that is no object or list."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _leaves(part, name)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part, key)
    else:
        yield key, value


def _says(text: str, value: Any) -> bool:
    """Whether a text shows a value, as it is or as JSON writes it."""
    return any(spelling in text for spelling in _spellings(value))


def _spellings(value: Any) -> Iterable[str]:
    if not isinstance(value, str):
        return (json.dumps(value), str(value))
    escaped = json.dumps(value, ensure_ascii=False)[1:-1]
    return (value, value.strip(), escaped, json.dumps(value)[1:-1], escaped.replace('"', "&quot;"))
