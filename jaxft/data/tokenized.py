"""Token sequences with loss masks, stored flat: one array of tokens, one of masks, and the borders.

`loss_mask[i]` says that token i is to be predicted, from the tokens before it. The first token of an example
has nothing before it and is never supervised.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np


class Tokenized(NamedTuple):
    """One example: tokens int32[n] and loss_mask bool[n], with `loss_mask[0]` False."""

    tokens: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class TokenizedSet:
    """n examples: tokens int32[total], loss_mask bool[total], offsets int64[n + 1] from 0 to total."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, examples: Iterable[Tokenized]) -> Self:
        examples = list(examples)
        tokens = [example.tokens for example in examples]
        masks = [example.loss_mask for example in examples]
        return cls(
            np.concatenate([np.zeros(0, np.int32), *tokens]),
            np.concatenate([np.zeros(0, bool), *masks]),
            np.cumsum([0, *map(len, tokens)], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Tokenized:
        if not 0 <= index < len(self):
            raise IndexError(index)
        where = slice(self.offsets[index], self.offsets[index + 1])
        return Tokenized(self.tokens[where], self.loss_mask[where])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64[n]."""
        return np.diff(self.offsets)

    def fingerprint(self) -> str:
        """SHA-256 of the tokens, the masks and the borders."""
        digest = hashlib.sha256()
        for array, dtype in ((self.offsets, "<i8"), (self.tokens, "<i4"), (self.loss_mask, "u1")):
            digest.update(np.ascontiguousarray(array, dtype))
        return digest.hexdigest()


def check_vocabulary(sets: Sequence[TokenizedSet], vocab_size: int) -> None:
    """Raise ValueError if a token has no row in an embedding of `vocab_size` rows; spare rows are normal."""
    largest = max((int(examples.tokens.max()) for examples in sets if len(examples.tokens)), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"the data holds token {largest}, but the model's embedding has {vocab_size} rows; use the "
            "tokenizer that belongs to the model"
        )
