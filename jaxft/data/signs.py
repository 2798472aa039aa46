"""Detects texts that were already rendered with a chat template.

There are two signs: the text begins as every conversation does under the template, and it contains the text that
precedes an answer. Blanks and a thought that a prompt opens are ignored: data come from many versions of a template,
which differ in these first.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from jaxft.data.conversations import Message
from jaxft.data.marks import Marked
from jaxft.data.shown import before_thought
from jaxft.data.template_process import TemplateError

#: A conversation that every template takes.
PROBE = (Message("user", "question"), Message("assistant", "answer"))
_SHORTEST = 3  # characters of what must stand before an answer to be a sign


def any_of(tokens: Iterable[str]) -> re.Pattern:
    """Matches each of the tokens, the longest first; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


class Signs:
    """The signs of one template.

    Args:
        render: messages under the template, of which the last is an answer. TemplateError where it takes none such.
        bos: BOS, if the template may write it; else "".
        special: matches the special tokens.
    """

    def __init__(self, render: Callable[[Sequence[Message]], Marked], bos: str, special: re.Pattern):
        self._bos, self._special = bos, special
        probe = render(PROBE)
        self._beginnings = [self._beginning(probe.text, PROBE)]
        with suppress(TemplateError):  # it takes no system message
            instructed = (Message("system", "instruction"), *PROBE)
            self._beginnings.append(self._beginning(render(instructed).text, instructed))
        self._header = ""
        if all(len(places) == 1 for places in (*probe.opens, *probe.closes)):
            between = probe.text[probe.closes[0][0] : probe.opens[1][0]]
            header = _shared_beginning(between, probe.tails.get("user") or between)
            self._header = _without_blanks(before_thought(header))

    def stand_in(self, text: str) -> bool:
        """Whether a text has both signs."""
        body = text.strip().removeprefix(self._bos).lstrip()
        begins = body.startswith(tuple(filter(None, self._beginnings)))
        if self._special.search(self._header):
            begins = begins or "" in self._beginnings or self._special.match(body)
        return bool(begins and len(self._header) >= _SHORTEST and self._header in _without_blanks(body))

    def _beginning(self, text: str, messages: Sequence[Message]) -> str:
        """The first token or word before the first content, BOS apart."""
        opening = text.partition(messages[0].content)[0].strip().removeprefix(self._bos).strip()
        token = self._special.match(opening)
        return token[0] if token else "".join(opening.split()[:1])


def _without_blanks(text: str) -> str:
    return "".join(text.split())


def _shared_beginning(one: str, other: str) -> str:
    """What two texts have in common before they differ."""
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]
