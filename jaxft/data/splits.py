"""Separates held-out examples from training examples.

Which examples are held out depends on their content and the seed alone, not on their order or their file. Two
examples are the same if they say the same, whatever format they came in; equal ones always stay on one side.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from jaxft.data.conversations import Conversation
from jaxft.data.formats import Completion, Example


def identity(example: Example) -> bytes:
    """SHA-256 of what an example says: roles, contents without outer blanks, tools. Not of its origin."""
    if isinstance(example, Conversation):
        turns = [(message.role, message.content.strip(), message.tool_calls) for message in example.messages]
        said: list = ["conversation", turns, example.tools]
    elif isinstance(example, Completion):
        said = ["completion", example.prompt.strip(), example.completion.strip()]
    else:
        said = ["text", example.text.strip()]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()


@dataclass(frozen=True)
class Split:
    """Indices of the examples on each side, ascending; `moved`: held out only because an equal one is."""

    train: tuple[int, ...]
    held_out: tuple[int, ...]
    moved: int


def hold_out(identities: Sequence[bytes], size: int | float, seed: int) -> Split:
    """Hold out `size` examples (a number, or a fraction below 1), or a few more where equal ones come along.

    Raises:
        ValueError: if that leaves nothing to train on or holds nothing out.
    """
    total = len(identities)
    wanted = round(size * total) if isinstance(size, float) else size
    if not 0 < wanted < total:
        missing = "none to train on" if wanted else "none held out"
        raise ValueError(f"`val_set_size` {size} of {total} examples leaves {missing}")
    groups: dict[bytes, list[int]] = {}
    for index, key in enumerate(identities):
        groups.setdefault(key, []).append(index)
    order = sorted(groups, key=lambda key: hashlib.sha256(f"{seed}:".encode() + key).digest())
    held_out: list[int] = []
    moved = 0
    for key in order:
        if len(held_out) >= wanted:
            break
        held_out += groups[key]
        moved += len(groups[key]) - 1
    if len(held_out) == total:
        raise ValueError(f"`val_set_size` {size} of {total} examples leaves none to train on: too many are equal")
    chosen = set(held_out)
    return Split(tuple(i for i in range(total) if i not in chosen), tuple(sorted(held_out)), moved)


def refuse_overlap(train: Sequence[Example], held_out: Sequence[Example]) -> None:
    """Raise ValueError, with a few origins on both sides, if an example stands on both."""
    trained: dict[bytes, str] = {}
    for example in train:
        trained.setdefault(identity(example), example.origin)
    shared = [(trained[key], example.origin) for example in held_out if (key := identity(example)) in trained]
    if shared:
        shown = "; ".join(f"{left} = {right}" for left, right in shared[:3])
        more = ", ..." if len(shared) > 3 else ""
        raise ValueError(
            f"{len(shared)} held-out examples are also trained on ({shown}{more}); remove them from one "
            "side, or use `val_set_size`"
        )
