"""A conversation rendered by its chat template, and where in the text each turn stands.

Nothing is found by looking at token values or by searching for the contents. The conversation is rendered a
second time with private-use characters around every content; where they come out is where the content came
out. The two renders must agree once the marks are taken away, so that a template which looks at its contents
cannot mislead.

What the model learns of an assistant turn

- begins where the prompt ends that it will be given: the text up to the turn as rendered with
  `add_generation_prompt`, if the whole conversation goes on like that prompt. So a `<think>` block that the
  template puts before an answer is learned unless the prompt supplies it. Where the two differ, it begins
  where the template puts a short answer in place of this one.
- ends with the end-of-turn token that the template writes after it: the first special token, such as
  `<|im_end|>`. What comes after (a newline, the header of the next turn) is not learned. If no special token
  ends a turn, all text that follows the last answer does, and EOS ends the conversation.

`{% generation %}` blocks in the template take precedence over all this, but the end of turn is learned in
any case.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import product
from typing import NamedTuple

from jaxft.data.conversations import Conversation, Message
from jaxft.data.template_process import TemplateError, TemplateProcess

Span = tuple[int, int]
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")


@dataclass(frozen=True)
class Rendered:
    """A text, what of it to learn and what of it came from the data, as character spans [start, end)."""

    text: str
    supervised: tuple[Span, ...]
    content: tuple[Span, ...]
    add_bos: bool = False
    add_eos: bool = False


class _Marked(NamedTuple):
    """A render with marks, taken apart: where in `text` each message's content begins and ends."""

    text: str
    opens: list[list[int]]
    closes: list[list[int]]
    generation: list[Span]
    tails: dict[str, str]  # role before an assistant turn -> what the prompt has after that message's content
    marked: list[Message]  # what was rendered


class ChatTemplate:
    """A chat template and the special tokens of the tokenizer that reads its output.

    Args:
        source: the Jinja template.
        variables: what the template sees besides the conversation, such as bos_token.
        special_tokens: texts that become a single token with a meaning of its own.
        today: the date for templates that write one; fixed, so that a resumed run reads the same data.
        time_limit: seconds for one conversation.
    """

    def __init__(
        self,
        source: str,
        variables: dict[str, str],
        special_tokens: Iterable[str],
        today: date,
        time_limit: float,
    ):
        self.special = re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))) or "(?!)")
        self.source = source
        self._process = TemplateProcess(source, variables, today, time_limit)
        probe = (Message("user", "question"), Message("assistant", "answer"))
        found = self._render(probe, (), [])
        if len(found.closes[1]) != 1:
            raise TemplateError("the chat template does not show the assistant's answer")
        after = found.text[found.closes[1][0] :]
        token = self.special.search(after)
        self.end_of_turn = after[: token.end()] if token else after
        self._add_eos = not token

    def render(self, conversation: Conversation) -> Rendered:
        """The whole conversation. TemplateError (a ValueError) if a turn cannot be located beyond doubt."""
        messages, tools = conversation.messages, conversation.tools
        self._refuse_special(messages, tools)
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        found = self._render(messages, tools, answers)
        _check_tools(found.text, tools)
        if _GENERATION.search(self.source):
            starts, supervised = {}, self._generation_spans(messages, found)
            learned = "".join(found.text[start:end] for start, end in supervised)
            for message in messages:
                _check_calls(learned if message.supervised else found.text, message)
        else:
            starts = self._starts(messages, tools, answers, found)
            turns = {i: (starts[i], self._end(messages, found, i, starts[i])) for i in answers}
            for i, (start, end) in turns.items():
                _check_calls(found.text[start:end], messages[i])
            supervised = [turns[i] for i in answers if messages[i].supervised]
        return Rendered(
            found.text,
            tuple(supervised),
            tuple(self._content_spans(messages, found, starts)),
            add_eos=self._add_eos and messages[-1].supervised,
        )

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict] = ()) -> Rendered:
        """What the model is given so that it writes the next assistant turn."""
        self._refuse_special(messages, tools)
        found = self._render(messages, tools, [], add_generation_prompt=True)
        return Rendered(found.text, (), tuple(self._content_spans(messages, found, {})))

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict],
        answers: list[int],
        add_generation_prompt: bool = False,
    ) -> _Marked:
        """Render plainly and with marks: around the whole contents, or inside their outer blanks, which
        templates may strip; and, where a template acts on what a system message says, not in that. For one
        assistant turn after each kind of role, render the prompt of that turn too."""
        marks = self._free_characters(messages, 2 * len(messages) + 2)
        last_after = {messages[i - 1].role: i for i in answers}
        for unmarked, mark in product(("", "system"), (_around, _inside)):
            marked = [
                message if message.role == unmarked else mark(message, *marks[2 * i : 2 * i + 2])
                for i, message in enumerate(messages)
            ]
            blocks = {"generation_start": marks[-2], "generation_end": marks[-1]}
            text, full, *prompts = self._process.render(
                [
                    _job(messages, tools, add_generation_prompt),
                    _job(marked, tools, add_generation_prompt) | blocks,
                    *(_job(marked[:i], tools, True) for i in last_after.values()),
                ]
            )
            stripped, where = _take_out(full, marks)
            if stripped == text:
                break
        else:
            raise TemplateError("the chat template changes the contents in a way that hides where the turns are")
        opens, closes = ([where[mark] for mark in marks[k:-2:2]] for k in (0, 1))
        tails = {}
        for (role, i), prompt in zip(last_after.items(), prompts, strict=True):
            _, shown, tail = prompt.rpartition(marks[2 * i - 1])
            if shown:
                tails[role] = _take_out(tail, marks)[0]
        generation = list(zip(where[marks[-2]], where[marks[-1]], strict=True))
        return _Marked(text, opens, closes, generation, tails, marked)

    def _starts(
        self, messages: Sequence[Message], tools: Sequence[dict], answers: list[int], found: _Marked
    ) -> dict[int, int]:
        """Where each assistant turn begins."""
        starts, headers = {}, None
        for i in answers:
            before = _only(found.closes[i - 1], messages, i - 1)
            header = found.tails.get(messages[i - 1].role)
            if header is None or not found.text.startswith(header, before):
                headers = headers or self._headers(messages, tools, answers, found.marked)
                header = headers.get(i)
            if header is None or not found.text.startswith(header, before):
                raise TemplateError(
                    f"cannot tell where the turn of message {i + 1} begins in the rendered conversation"
                )
            starts[i] = before + len(header)
        return starts

    def _headers(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict],
        answers: list[int],
        marked: list[Message],
    ) -> dict[int, str]:
        """Assistant turn -> what stands between the content before it and an answer of one character."""
        marks = self._free_characters(messages, 2 * len(messages) + 2)
        short = [
            Message("assistant", marks[2 * i], tool_calls=message.tool_calls) if i in answers else message
            for i, message in enumerate(marked)
        ]
        text, where = _take_out(self._process.render([_job(short, tools, False)])[0], marks)
        places = {i: (where[marks[2 * i - 1]], where[marks[2 * i]]) for i in answers}
        return {i: text[a[0] : b[0]] for i, (a, b) in places.items() if len(a) == len(b) == 1 and a <= b}

    def _end(self, messages: Sequence[Message], found: _Marked, i: int, start: int) -> int:
        """Where the assistant turn of message i ends, its end-of-turn token included."""
        content_end = _only(found.closes[i], messages, i) if messages[i].content else start
        following = [place for places in found.opens[i + 1 :] for place in places if place >= content_end]
        limit = min(following, default=len(found.text))
        end = found.text.find(self.end_of_turn, content_end, limit)
        if end >= 0 and self.end_of_turn:
            return end + len(self.end_of_turn)
        if (self.end_of_turn and not following) or not messages[i].content:
            raise TemplateError(f"cannot tell where the turn of message {i + 1} ends in the rendered conversation")
        return content_end

    def _generation_spans(self, messages: Sequence[Message], found: _Marked) -> list[Span]:
        """The template's own `{% generation %}` blocks, each with the end of turn that follows it."""
        unlearned = [
            place
            for message, places in zip(messages, found.closes, strict=True)
            if message.role == "assistant" and not message.supervised
            for place in places
        ]
        spans = []
        for start, end in found.generation:
            closed = found.text[:end].rstrip().endswith(self.end_of_turn.strip())
            if not closed and found.text.startswith(self.end_of_turn, end):
                end += len(self.end_of_turn)
            if not any(start <= place <= end for place in unlearned):
                spans.append((start, end))
        return spans

    def _content_spans(self, messages: Sequence[Message], found: _Marked, starts: dict[int, int]) -> Iterable[Span]:
        """What came from the data; an answer whose beginning was cut off, from the start of its turn."""
        for i, (message, opens, closes) in enumerate(zip(messages, found.opens, found.closes, strict=True)):
            if not opens and len(closes) == 1 and i in starts:
                opens = [starts[i]]
            written = set(self.special.findall(message.content))
            if not opens or len(opens) != len(closes) or any(map(int.__gt__, opens, closes)):
                if written:
                    raise TemplateError(
                        f"message {i + 1} holds {written.pop()!r} and the chat template cuts its content"
                    )
                continue
            for span in zip(opens, closes, strict=True):
                if foreign := set(self.special.findall(found.text, *span)) - written:
                    raise TemplateError(f"the chat template puts {foreign.pop()!r} into the content of message {i + 1}")
                yield span

    def _refuse_special(self, messages: Sequence[Message], tools: Sequence[dict]) -> None:
        calls = [call for message in messages for call in message.tool_calls]
        ids = [message.tool_call_id for message in messages]
        if token := self.special.search(json.dumps([*tools, *calls, *ids], ensure_ascii=False)):
            raise ValueError(f"the special token {token[0]!r} stands in `tools` or in a tool call; take it out")

    def _free_characters(self, messages: Sequence[Message], count: int) -> list[str]:
        """Private-use characters that occur nowhere in the template or the contents."""
        taken = set(self.source).union(*(message.content for message in messages))
        return [char for code in range(0x100000, 0x100000 + count + len(taken)) if (char := chr(code)) not in taken][
            :count
        ]


def _check_tools(text: str, tools: Sequence[dict]) -> None:
    for tool in tools:
        if tool["function"]["name"] not in text:
            raise TemplateError(
                f"the chat template does not show the tool {tool['function']['name']!r}; use a template "
                "that knows `tools`, or take them out of the data"
            )


def _check_calls(turn: str, message: Message) -> None:
    for call in message.tool_calls:
        if call["function"]["name"] not in turn:
            raise TemplateError(
                f"the chat template does not show the call of {call['function']['name']!r}; use a template "
                "that knows `tool_calls`, or take such conversations out of the data"
            )


def _only(places: list[int], messages: Sequence[Message], i: int) -> int:
    if len(places) != 1:
        raise TemplateError(
            f"the chat template writes the content of message {i + 1} ({messages[i].role}) {len(places)} "
            "times, so the turns cannot be located"
        )
    return places[0]


def _around(message: Message, opening: str, closing: str) -> Message:
    return _with_content(message, f"{opening}{message.content}{closing}")


def _inside(message: Message, opening: str, closing: str) -> Message:
    body = message.content.strip()
    before, _, after = message.content.partition(body) if body else ("", "", message.content)
    return _with_content(message, f"{before}{opening}{body}{closing}{after}")


def _with_content(message: Message, content: str) -> Message:
    if message.role == "assistant" and not message.content:
        return message  # calls tools and says nothing, which templates test for
    return Message(message.role, content, message.supervised, message.tool_calls, message.tool_call_id)


def _job(messages: Sequence[Message], tools: Sequence[dict], add_generation_prompt: bool) -> dict:
    turns = []
    for message in messages:
        turn: dict = {"role": message.role, "content": message.content}
        if message.tool_calls:
            turn["tool_calls"] = message.tool_calls
        if message.tool_call_id:
            turn["tool_call_id"] = message.tool_call_id
        turns.append(turn)
    return {
        "messages": turns,
        "tools": tools or None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }


def _take_out(text: str, marks: Sequence[str]) -> tuple[str, dict[str, list[int]]]:
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
