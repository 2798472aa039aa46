"""Records events on an example's way to tokens that the owner of the data should know.

An example that cannot be trained on is a bad record. If only a part of an example cannot be used, the run trains on the
rest, and an event says what was left out. Events of one name are counted together. The account of the data shows them,
and with `strict_data` a loss is an error.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Self


class Event(NamedTuple):
    """`lost`: the example says something that is not in what is trained on. Otherwise the event is for information."""

    name: str
    lost: bool = True


REASONING_LOST = Event("the chat template does not show the reasoning of an answer that is learned")
REASONING_LEFT_OUT = Event("the chat template does not show the reasoning of an answer that is not learned", lost=False)
EMPTY_THOUGHT = Event("the chat template puts an empty thought before an answer, and it is learned", lost=False)
CONTENT_CUT = Event("the chat template shows a part of a content only")
BESIDE_CALL = Event("the chat template does not show all of the content beside a tool call")
MARKUP_SPELT = Event("a content spells special tokens or markup of the chat template; they are read as letters")
FOREIGN_MARKUP = Event("a text holds the markup of another chat template; it is read as letters")
RENDERED = Event("already rendered by this chat template: special tokens are read as such", lost=False)
WRITTEN_ENDS = Event("BOS or EOS is spelt at an end of the text; it is read as the token, once", lost=False)
CALL_IDS = Event("ids of tool calls are rewritten to nine letters, as the chat template asks", lost=False)
RESULT_OF_NO_CALL = Event("the result of a tool names no call that waits for one; it is given to the first that does")
ARGUMENTS_LOST = Event("the chat template does not show all arguments of a tool call")
FILLED_NULLS = Event(
    "fields that are absent, as Arrow fills them in, are left out of tools, calls and messages", lost=False
)


def not_shown(role: str) -> Event:
    return Event(f"the chat template does not show a message of role {role}")


def key_not_read(key: str) -> Event:
    return Event(f"the chat template does not read the key `{key}` of a message")


def tool_field_not_shown(field: str) -> Event:
    return Event(f"the chat template does not show the field `{field}` of a tool")


def call_key_not_read(key: str) -> Event:
    return Event(f"the key `{key}` of a tool call is not read")


def part_key_not_read(key: str) -> Event:
    return Event(f"the key `{key}` of a part of a content is not read")


def thought_written_otherwise(tag: str, own: str) -> Event:
    return Event(f"an answer that is learned begins with {tag}, but the chat template writes reasoning in {own}")


def role_read_as(given: str, role: str) -> Event:
    return Event(f"role {given} is read as {role}", lost=False)


@dataclass(frozen=True)
class EventCount:
    """Examples with one event, and the origin of the first of them."""

    name: str
    lost: bool
    examples: int
    first: str

    @classmethod
    def of(cls, happened: Iterable[tuple[str, Iterable[Event]]]) -> tuple[Self, ...]:
        """Counts from (origin, events) of each example: losses first, then the commonest first."""
        found: dict[Event, list[str]] = {}
        for origin, events in happened:
            for event in dict.fromkeys(events):
                found.setdefault(event, []).append(origin)
        counts = [cls(event.name, event.lost, len(origins), origins[0]) for event, origins in found.items()]
        return tuple(sorted(counts, key=lambda count: (not count.lost, -count.examples)))

    def __str__(self) -> str:
        return f"{self.examples} example{'s' if self.examples > 1 else ''}: {self.name} (first: {self.first})"
