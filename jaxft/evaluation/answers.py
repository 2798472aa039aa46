"""Let a model answer held-out prompts, and count the answers that are exactly right."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxft.data.chat import Renderer
from jaxft.data.formats import Completion, Example, Text
from jaxft.generation.generate import generate
from jaxft.models.decoder import Decoder

ROWS = 32
"""Prompts answered at a time."""


class Question(NamedTuple):
    """A held-out prompt as tokens and as the user's words, and the answer it should get."""

    tokens: Sequence[int]
    text: str
    reference: str


def questions(examples: Sequence[Example], renderer: Renderer, count: int, positions: int) -> list[Question]:
    """The first `count` examples that ask something (plain text does not) and leave room to answer.

    Args:
        positions: of the model; a prompt that takes them all is passed over.
    """
    asked = []
    for example in examples:
        if isinstance(example, Text) or len(asked) == count:
            continue
        tokens, reference = renderer.prompt(example)
        if len(tokens) < positions:
            asked.append(Question(tokens, _last_words(example), reference))
    return asked


def answers(
    model: Decoder, renderer: Renderer, asked: Sequence[Question], eos_ids: Sequence[int], max_new_tokens: int
) -> list[str]:
    """Greedy answers, one to a question."""
    found = []
    for first in range(0, len(asked), ROWS):
        prompts = [question.tokens for question in asked[first : first + ROWS]]
        for tokens in generate(model, prompts, max_new_tokens=max_new_tokens, eos_ids=eos_ids):
            found.append(renderer.tokenizer.decode(tokens, skip_special_tokens=True))
    return found


def exact_matches(found: Sequence[str], asked: Sequence[Question]) -> int:
    """Answers equal to the reference, outer white space aside."""
    return sum(answer.strip() == question.reference.strip() for answer, question in zip(found, asked, strict=True))


def _last_words(example: Example) -> str:
    if isinstance(example, Completion):
        return example.prompt
    return [message.content for message in example.messages if message.role == "user"][-1]
