"""Let a model answer held-out prompts, and count the answers that are exactly right.

Of a conversation the last turn is asked for that the model would learn. Its reference is what it would learn there,
as text: the answer, or a tool call as the template writes it, with all that the template puts before it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from jaxft.data.chat import Encoded, Renderer
from jaxft.data.conversations import Conversation
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
        positions: of the model; a prompt that takes them all is passed over, and so is a conversation that its
            template cannot render up to its last answer.
    """
    asked = []
    for example in examples:
        if isinstance(example, Text) or len(asked) == count:
            continue
        question = (
            _of_completion(example, renderer) if isinstance(example, Completion) else _of_turns(example, renderer)
        )
        if question is not None and len(question.tokens) < positions:
            asked.append(question)
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


def _of_completion(example: Completion, renderer: Renderer) -> Question:
    tokens, reference = renderer.prompt(example)
    return Question(tokens, example.prompt, reference)


def _of_turns(example: Conversation, renderer: Renderer) -> Question | None:
    turns = example.messages
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    last = max([i for i in answers if turns[i].supervised] or answers)
    asker = max(i for i, turn in enumerate(turns[:last]) if turn.role == "user")
    text = "\n".join(turn.content for turn in turns[asker:last] if turn.content)

    example = replace(example, messages=(*turns[:last], replace(turns[last], supervised=True)))
    (found,) = renderer.encode([example])
    if not isinstance(found, Encoded):
        return None
    prompt, _ = renderer.prompt(example)
    whole = found.tokenized
    shared = min(len(prompt), len(whole.tokens))
    differs = np.flatnonzero(prompt[:shared] != whole.tokens[:shared])
    begin = int(differs[0]) if differs.size else shared
    learned = whole.tokens[begin:][whole.loss_mask[begin:]]
    return Question(prompt, text, renderer.tokenizer.decode(learned, skip_special_tokens=True).strip())
