"""Finds the contents in a rendered conversation by private-use characters around each of them.

The conversation is rendered plainly and with the marks, and the two must agree once the marks are taken away, so that a
template which looks at its contents cannot mislead.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from jaxft.data.conversations import Message
from jaxft.data.template_process import TemplateError

Job = Callable[[Sequence[Message], bool], dict]
"""The variables of a template for these messages, with or without the prompt for an answer."""


class Marked(NamedTuple):
    """A render with marks, taken apart: where in `text` each message's content begins and ends."""

    text: str
    opens: list[list[int]]
    closes: list[list[int]]
    generation: list[tuple[int, int]]
    tails: dict[str, str]  # role before an assistant turn -> what the prompt has after that message's content
    marked: list[Message]  # what was rendered


def render_with_marks(
    render: Callable[[list[dict]], list[str]],
    job: Job,
    messages: Sequence[Message],
    answers: Sequence[int],
    add_generation_prompt: bool,
    source: str,
) -> Marked:
    """Marks stand around the whole contents, or inside their outer blanks, which templates may strip. Where a template
    acts on what stands beside a call of a tool, or in a system message, there are none in that. For one assistant turn
    after each kind of role, the prompt of that turn is rendered, too.

    Args:
        render: renders jobs of a template.
        job: makes one.
        answers: indices of the assistant turns.
        source: the template, in which no mark may occur.

    Raises:
        TemplateError: the template changes the contents so that nothing can be told.
    """
    marks = free_characters(source, messages)
    last_after = {messages[i - 1].role: i for i in answers}
    for unmarked, mark in product(((), ("call",), ("system",), ("call", "system")), (_around, _inside)):
        marked = [
            message if _kind(message) in unmarked else mark(message, *marks[2 * i : 2 * i + 2])
            for i, message in enumerate(messages)
        ]
        blocks = {"generation_start": marks[-2], "generation_end": marks[-1]}
        text, full, *prompts = render(
            [
                job(messages, add_generation_prompt),
                job(marked, add_generation_prompt) | blocks,
                *(job(marked[:i], True) for i in last_after.values()),
            ]
        )
        stripped, where = take_out(full, marks)
        if stripped == text:
            break
    else:
        raise TemplateError("the chat template changes the contents in a way that hides where the turns are")
    opens, closes = ([where[mark] for mark in marks[k:-2:2]] for k in (0, 1))
    tails = {}
    for (role, i), prompt in zip(last_after.items(), prompts, strict=True):
        _, shown, tail = prompt.rpartition(marks[2 * i - 1])
        if shown:
            tails[role] = take_out(tail, marks)[0]
    generation = list(zip(where[marks[-2]], where[marks[-1]], strict=True))
    return Marked(text, opens, closes, generation, tails, marked)


def free_characters(source: str, messages: Sequence[Message]) -> list[str]:
    """Private-use characters that occur nowhere in the template or the messages: two for each and two more."""
    taken = set(source).union(*(message.content for message in messages))
    taken |= set(json.dumps([message.extra for message in messages], ensure_ascii=False))
    count = 2 * len(messages) + 2
    codes = range(0x100000, 0x100000 + count + len(taken))
    return [char for code in codes if (char := chr(code)) not in taken][:count]


def _kind(message: Message) -> str:
    return "call" if message.tool_calls else message.role


def _around(message: Message, opening: str, closing: str) -> Message:
    return _with_content(message, f"{opening}{message.content}{closing}")


def _inside(message: Message, opening: str, closing: str) -> Message:
    body = message.content.strip()
    before, _, after = message.content.partition(body) if body else ("", "", message.content)
    return _with_content(message, f"{before}{opening}{body}{closing}{after}")


def _with_content(message: Message, content: str) -> Message:
    if message.role == "assistant" and not message.content:
        return message  # calls tools and says nothing, which templates test for
    return replace(message, content=content)


def take_out(text: str, marks: Sequence[str]) -> tuple[str, dict[str, list[int]]]:
    """The text without the marks, and where in it each stood."""
    where: dict[str, list[int]] = {mark: [] for mark in marks}
    pieces, length = [], 0
    for piece in re.split(f"([{''.join(marks)}])", text):
        if piece in where:
            where[piece].append(length)
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), where
