"""Renders texts and completions, which the model learns to the end, without a chat template.

A completion is prompt + completion + EOS, a text is text + EOS, each after BOS if the tokenizer adds one. Data often
spell the two at their ends already; then they are read as the tokens, and not added again. A text that went through
the chat template before it came here keeps its special tokens, and is closed by the template's end of turn.
"""

import re
from dataclasses import dataclass

from jaxft.data import shown
from jaxft.data.events import RENDERED, WRITTEN_ENDS
from jaxft.data.formats import Completion, Text
from jaxft.data.template_process import OUTPUT_LIMIT, OutputLimitError
from jaxft.data.turns import ChatTemplate, Rendered


@dataclass(frozen=True)
class Continuations:
    """Renders texts and completions.

    Args:
        bos: the text of BOS; None if there is none.
        eos: the text of EOS; None if there is none.
        adds_bos: whether the tokenizer puts BOS before a text.
        template: the chat template, which closes what went through it already; None if there is none.
        special: finds what the tokenizer reads as a special token.
        own_markup: all added tokens, which are no other model's markup.
    """

    bos: str | None
    eos: str | None
    adds_bos: bool
    template: ChatTemplate | None
    special: re.Pattern[str]
    own_markup: str

    def render(self, example: Text | Completion) -> Rendered:
        """The whole example.

        Raises:
            OutputLimitError: it has more characters than are tokenized.
        """
        if isinstance(example, Completion):
            asked, answer = example.prompt, example.completion
        else:
            asked, answer = "", example.text
        if len(asked) + len(answer) > OUTPUT_LIMIT:
            raise OutputLimitError(f"more than {OUTPUT_LIMIT} characters")
        return self._closed(example, asked, answer) if example.rendered else self._spelt(example, asked, answer)

    def prompt(self, example: Completion) -> Rendered:
        """What comes before the completion, as `render` has it."""
        whole = self.render(example)
        length = whole.supervised[0][0]
        content = tuple((start, min(end, length)) for start, end in whole.content)
        return Rendered(whole.text[:length], (), content, add_bos=whole.add_bos)

    def begins_with_bos(self, text: str) -> bool:
        """Whether the text spells BOS at its beginning."""
        return bool(self.bos) and text.lstrip().startswith(self.bos)

    def _ends_with_eos(self, text: str) -> bool:
        return bool(self.eos) and text.rstrip().endswith(self.eos)

    def _closed(self, example: Text | Completion, asked: str, answer: str) -> Rendered:
        """What went through the template: its special tokens stay, its last turn is closed."""
        ends = self._ends_with_eos(answer)
        if not ends:
            answer += self.template.closing(answer)
        if self.template.begins_with_bos and not self.begins_with_bos(asked + answer):
            asked = self.bos + asked
        text, closed = asked + answer, ends or self.template.stop is not None
        return Rendered(text, ((len(asked), len(text)),), (), add_eos=not closed, events=(*example.events, RENDERED))

    def _spelt(self, example: Text | Completion, asked: str, answer: str) -> Rendered:
        """What its owner wrote: all letters, but for a BOS and an EOS at its ends."""
        starts = self.adds_bos and self.begins_with_bos(asked + answer)
        if starts and asked:
            asked = asked.lstrip().removeprefix(self.bos)
        elif starts:
            answer = answer.lstrip().removeprefix(self.bos)
        if ends := self._ends_with_eos(answer):
            answer = answer.rstrip().removesuffix(self.eos)
        text = asked + answer
        written = (WRITTEN_ENDS,) if starts or ends else ()
        markup = shown.markup_events(text, self.special, self.own_markup)
        return Rendered(
            text, ((len(asked), len(text)),), ((0, len(text)),), True, True, (*example.events, *written, *markup)
        )
