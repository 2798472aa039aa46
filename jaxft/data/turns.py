"""Renders a conversation with its chat template and finds the position of each turn in the text.

Nothing is found by looking at token values or by searching for the contents, but by marks around them
(`jaxft.data.marks`).

What the model learns of an assistant turn

- begins where the prompt ends that it will be given: the text up to the turn as rendered with
  `add_generation_prompt`, if the whole conversation goes on like that prompt. So a `<think>` block that the
  template puts before an answer is learned unless the prompt supplies it. Where the two differ, it begins
  where the template puts a short answer in place of this one.
- ends with the end-of-turn token that the template writes after it: the first special token, such as
  `<|im_end|>`. What comes after (a newline, the header of the next turn) is not learned. If no special token
  ends a turn, all text that follows the last answer does, and EOS ends the conversation; earlier answers then
  end in nothing that stops generation, and may not be learned.

`{% generation %}` blocks in the template take precedence over all this, but the end of turn is learned in
any case.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property

from jaxft.data import shown
from jaxft.data.conversations import Conversation, Message
from jaxft.data.events import CALL_IDS, Event, key_not_read
from jaxft.data.marks import Marked, free_characters, render_with_marks, take_out
from jaxft.data.signs import PROBE, Signs, any_of
from jaxft.data.template_input import CALL, CALLED, CallForm, find_call_form, job, rewrites_ids
from jaxft.data.template_process import OUTPUT_LIMIT, OutputLimitError, TemplateError, TemplateProcess

Span = tuple[int, int]
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
_OPENING = len("<reasoning>\n")


@dataclass(frozen=True)
class Rendered:
    """A text, what of it to learn and what of it came from the data, as character spans [start, end)."""

    text: str
    supervised: tuple[Span, ...]
    content: tuple[Span, ...]
    add_bos: bool = False
    add_eos: bool = False
    events: tuple[Event, ...] = ()


class ChatTemplate:
    """A chat template and the tokens of the tokenizer that reads its output.

    Args:
        source: the Jinja template.
        variables: what the template sees besides the conversation, such as bos_token.
        special_tokens: texts that become a single token with a meaning of its own.
        today: the date for templates that write one; fixed, so that a resumed run reads the same data.
        time_limit: seconds for one conversation.
        added_tokens: other texts that become a single token, and may end a turn.

    Attributes:
        begins_with_bos: whether the template writes BOS before a conversation.
        end_of_turn: what the template writes after an answer, up to the token that stops generation.
        stop: that token; None where there is none, and EOS ends the conversation.
    """

    def __init__(
        self,
        source: str,
        variables: dict[str, str],
        special_tokens: Iterable[str],
        today: date,
        time_limit: float,
        added_tokens: Iterable[str] = (),
    ):
        special_tokens = list(special_tokens)
        self.special = any_of(special_tokens)
        self.source = source
        self._process = TemplateProcess(source, variables, today, time_limit)
        self._added = " ".join([*special_tokens, *added_tokens])
        found = self._render(PROBE, (), [1])
        if len(found.closes[1]) != 1:
            raise TemplateError("the chat template does not show the assistant's answer")
        after = found.text[found.closes[1][0] :]
        token = self.special.search(after) or any_of(token for token in added_tokens if token.strip()).search(after)
        self.end_of_turn = after[: token.end()] if token else after
        self.stop = token and token[0]
        self._bos = variables.get("bos_token", "") if "bos_token" in source else ""
        self.begins_with_bos = bool(self._bos) and found.text.lstrip().startswith(self._bos)

    def render(self, conversation: Conversation) -> Rendered:
        """The whole conversation. TemplateError (a ValueError) if a turn cannot be located beyond doubt."""
        messages, tools = conversation.messages, conversation.tools
        if sum(len(message.content) for message in messages) > OUTPUT_LIMIT:
            raise OutputLimitError(f"more than {OUTPUT_LIMIT} characters")
        self._refuse_special(messages, tools)
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        found = self._render(messages, tools, answers)
        turns: dict[int, Span] = {}
        if _GENERATION.search(self.source):
            supervised = self._generation_spans(messages, found)
        else:
            starts = self._starts(messages, tools, answers, found)
            turns = {i: (starts[i], self._end(messages, found, i, starts[i])) for i in answers}
            supervised = [turns[i] for i in answers if messages[i].supervised]
        add_eos = self.stop is None and messages[-1].supervised
        self._check_stops(found.text, supervised, add_eos)
        content = tuple(self._content_spans(messages, found, {i: start for i, (start, _) in turns.items()}))
        events = (*conversation.events, *self._events(messages, tools, found, turns, supervised))
        return Rendered(found.text, tuple(supervised), content, add_eos=add_eos, events=events)

    def is_rendered(self, text: str) -> bool:
        """Whether a text went through this template already."""
        return self._signs.stand_in(text)

    @cached_property
    def _signs(self) -> Signs:
        return Signs(lambda messages: self._render(messages, (), [len(messages) - 1]), self._bos, self.special)

    def closing(self, text: str) -> str:
        """What a text that was rendered already lacks of an end of turn; empty where it has one."""
        if self.stop is None or text.rstrip().endswith(self.end_of_turn.strip()):
            return ""
        return self.end_of_turn

    @cached_property
    def _call_form(self) -> CallForm:
        return find_call_form(lambda one: self._process.render([one])[0])

    @cached_property
    def _call_stop(self) -> str | None:
        """The token that ends a turn which calls a tool: the same as after an answer, if it follows the call at all."""
        try:
            text = self._process.render([self._job(CALL, (), False)])[0]
        except TemplateError:
            return None
        _, called, after = text.rpartition(CALLED)
        if not called or (self.stop and self.end_of_turn in after):
            return self.stop
        token = self.special.search(after)
        return token and token[0]

    @property
    def stops(self) -> tuple[str, ...]:
        """The tokens after which generation must stop, that of answers first; empty where EOS alone ends an answer."""
        return tuple(dict.fromkeys(stop for stop in (self.stop, self._call_stop) if stop is not None))

    def _job(self, messages: Sequence[Message], tools: Sequence[dict], add_generation_prompt: bool) -> dict:
        form = self._call_form if any(message.tool_calls for message in messages) else CallForm()
        return job(messages, tools, add_generation_prompt, form)

    def _check_stops(self, text: str, supervised: Sequence[Span], add_eos: bool) -> None:
        """Refuse a learned answer after which generation would not stop."""
        for k, (start, end) in enumerate(supervised, 1):
            ends = text[start:end].rstrip().endswith(self.stops)
            if not ends and not (add_eos and k == len(supervised)):
                after = repr(text[end : end + 20]) if text[end:] else "nothing"
                raise TemplateError(
                    "an answer that is learned ends in no token that stops generation, as the chat template writes "
                    f"{after} after it; use a template that ends every answer with such a token "
                    "(chat_template: chatml), or learn the last answer of a conversation only (mask_history: true)"
                )

    def _events(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict],
        found: Marked,
        turns: dict[int, Span],
        supervised: Sequence[Span],
    ) -> Iterable[Event]:
        """What the conversation says and the text does not show. TemplateError where a tool or a call is not shown."""
        learned = "".join(found.text[start:end] for start, end in supervised)
        yield from shown.tool_events(tools, found.text, self.source)
        for i, message in enumerate(messages):
            turn = found.text[slice(*turns[i])] if i in turns else found.text
            yield from shown.content_events(message, turn, bool(found.opens[i] or found.closes[i]))
            yield from shown.call_events(message, learned if message.supervised and not turns else turn, self.source)
            yield from shown.markup_events(message.content, self.special, self._added, self.source)
            if i in turns:
                # Some prompts open the thought, and only its end is learned.
                before = found.text[: turns[i][0]][-_OPENING:] + turn.partition(message.content.strip() or "\0")[0]
                yield from shown.thought_events(message, before, self.source)
        if any(message.tool_calls for message in messages) and rewrites_ids(messages, self._call_form):
            yield CALL_IDS
        yield from self._key_events(messages, tools, found.text)

    def _key_events(self, messages: Sequence[Message], tools: Sequence[dict], text: str) -> Iterable[Event]:
        """Keys of messages that change nothing in the text. ValueError if one that does holds a special token."""
        for key in sorted({key for message in messages for key in message.extra}):
            without = [
                replace(message, extra={name: value for name, value in message.extra.items() if name != key})
                for message in messages
            ]
            try:
                is_shown = self._process.render([self._job(without, tools, False)])[0] != text
            except TemplateError:
                is_shown = True
            if not is_shown:
                yield key_not_read(key)
                continue
            values = [message.extra.get(key) for message in messages]
            if token := self.special.search(json.dumps(values, ensure_ascii=False)):
                raise ValueError(f"the special token {token[0]!r} stands in `{key}` of a message; take it out")

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict] = ()) -> Rendered:
        """What the model is given so that it writes the next assistant turn."""
        self._refuse_special(messages, tools)
        found = self._render(messages, tools, add_generation_prompt=True)
        return Rendered(found.text, (), tuple(self._content_spans(messages, found, {})))

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict],
        answers: Sequence[int] = (),
        add_generation_prompt: bool = False,
    ) -> Marked:
        return render_with_marks(
            self._process.render,
            lambda turns, prompt: self._job(turns, tools, prompt),
            messages,
            answers,
            add_generation_prompt,
            self.source,
        )

    def _starts(
        self, messages: Sequence[Message], tools: Sequence[dict], answers: list[int], found: Marked
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
        marks = free_characters(self.source, messages)
        short = [
            replace(message, content=marks[2 * i]) if i in answers else message for i, message in enumerate(marked)
        ]
        text, where = take_out(self._process.render([self._job(short, tools, False)])[0], marks)
        places = {i: (where[marks[2 * i - 1]], where[marks[2 * i]]) for i in answers}
        return {i: text[a[0] : b[0]] for i, (a, b) in places.items() if len(a) == len(b) == 1 and a <= b}

    def _end(self, messages: Sequence[Message], found: Marked, i: int, start: int) -> int:
        """Where the assistant turn of message i ends, its end-of-turn token included.

        Where no such token follows, it ends with its content, or before the next content if it calls a tool;
        `_check_stops` decides whether that can be learned.
        """
        calls = bool(messages[i].tool_calls)
        content_end = start if calls and not found.closes[i] else _only(found.closes[i], messages, i)
        following = [place for places in found.opens[i + 1 :] for place in places if place >= content_end]
        limit = min(following, default=len(found.text))
        end = found.text.find(self.end_of_turn, content_end, limit) if self.end_of_turn else -1
        if end >= 0:
            return end + len(self.end_of_turn)
        end = found.text.rfind(self._call_stop, content_end, limit) if calls and self._call_stop else -1
        if end >= 0:
            return end + len(self._call_stop)
        return limit if calls else content_end

    def _generation_spans(self, messages: Sequence[Message], found: Marked) -> list[Span]:
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

    def _content_spans(self, messages: Sequence[Message], found: Marked, starts: dict[int, int]) -> Iterable[Span]:
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


def _only(places: list[int], messages: Sequence[Message], i: int) -> int:
    if len(places) != 1:
        raise TemplateError(
            f"the chat template writes the content of message {i + 1} ({messages[i].role}) {len(places)} "
            "times, so the turns cannot be located"
        )
    return places[0]
