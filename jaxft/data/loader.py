"""Makes batches in an order that one integer, the step, describes.

Each epoch chooses its examples, shuffles them by (seed, epoch), packs them into rows and shuffles the rows.
Step n of the run is a fixed slice of the rows of its epoch, so a run resumes exactly from the number of steps
taken. The slice depends on the number of rows in a step. It does not depend on the number of micro-batches
or devices. The last step of an epoch is filled up with empty rows; no example is dropped, and none moves into the
next epoch.

An epoch is one pass over all sources. With weights, it has as many examples as there are in all sources
together, and each source gives its share by weight: a small one comes round several times, a large one goes
on in the next epoch where it stopped in this one, each of its passes newly shuffled.
"""

import hashlib
import json
import math
import sys
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from jaxft.data.batch import Batch
from jaxft.data.packing import pack
from jaxft.data.tokenized import Tokenized, TokenizedSet

_MULTIPLE = 128  # of row lengths without packing, which hardware tiles well


class Schedule:
    """The batches of a run, by step: `schedule[step]`, for any step from 0.

    Args:
        sources: tokenized examples of each source.
        micro_batch_size: rows of one micro-batch, over all devices.
        accumulation_steps: micro-batches per step.
        max_length: tokens of a row; without packing, rows are as long as the longest example, rounded up.
        parts: number of parts that the tokens of a row are cut into; it divides `max_length`.
        packing: several examples per row.
        weights: of the sources, relative; None = every example once per epoch.
        seed: fixes the order.
        rows: the rows of each micro-batch to make, in order; None = all. The order of examples does not depend on them.
    """

    def __init__(
        self,
        sources: Sequence[TokenizedSet],
        *,
        micro_batch_size: int,
        accumulation_steps: int = 1,
        max_length: int,
        packing: bool,
        parts: int = 1,
        weights: Sequence[float] | None = None,
        seed: int,
        rows: Sequence[int] | None = None,
    ):
        if not all(map(len, sources)):
            raise ValueError("a source has no examples")
        self._sources = list(sources)
        self._first = np.cumsum([0, *map(len, sources)])  # number of a source's first example
        self._lengths = np.concatenate([source.lengths for source in sources])
        self._shape = (accumulation_steps, micro_batch_size)
        self._made = range(micro_batch_size) if rows is None else rows
        self._packing, self._seed = packing, seed
        self.row_length = max_length if packing else row_length(sources, max_length, parts)
        self._shares = _shares(sources, weights)
        self._regular = weights is None or not packing  # every epoch has as many rows as the first
        self._order = [packing, self.row_length if packing else None, self._shares, seed]
        self._ends = [0]  # the step after the last one of each epoch, as far as known, after a first 0
        self._rows: tuple[int, list[list[int]]] = (-1, [])  # the epoch planned last, and its rows
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sys.maxsize  # epochs follow each other without an end

    def __repr__(self) -> str:  # of the same length always, as Grain puts it into its own messages
        return f"Schedule({len(self._sources)} sources)"

    def __getitem__(self, step: int) -> Batch:
        with self._lock:
            epoch, start = self._epoch_of(step)
            rows = self._plan(epoch)
        steps, size = self._shape
        first = (step - start) * steps * size
        wanted = [first + micro * size + row for micro in range(steps) for row in self._made]
        chosen = [[self._example(index) for index in rows[row]] if row < len(rows) else [] for row in wanted]
        return _fill(chosen, (steps, len(self._made)), self.row_length)

    def steps(self, epochs: float = 1.0) -> int:
        """Steps in this many epochs from the start; for part of an epoch, that part of its steps, rounded up.

        Epochs are of equal length unless weights and packing are combined.
        """
        whole, part = divmod(epochs, 1)
        with self._lock:
            before = self._end(int(whole) - 1)
            return before + int(np.ceil(part * (self._end(int(whole)) - before))) if part else before

    def epoch(self, step: int) -> float:
        """Epochs completed after `step` steps."""
        with self._lock:
            epoch, start = self._epoch_of(step)
            return epoch + (step - start) / (self._end(epoch) - start)

    def examples(self, step: int) -> int:
        """Examples seen in the first `step` steps; one that came twice counts twice."""
        with self._lock:
            epoch, start = self._epoch_of(step)
            rows = self._plan(epoch)[: (step - start) * self._shape[0] * self._shape[1]]
            return epoch * sum(self._shares) + sum(map(len, rows))

    def ends_epoch(self, step: int) -> bool:
        """Whether step `step` completes an epoch."""
        return math.floor(self.epoch(step)) > math.floor(self.epoch(step - 1))

    def fingerprint(self) -> str:
        """SHA-256 of the tokens and of what decides their order: with as many rows to a step, each learns the same."""
        described = json.dumps([self._order, [source.fingerprint() for source in self._sources]])
        return hashlib.sha256(described.encode()).hexdigest()

    def _end(self, epoch: int) -> int:
        """The step after the last one of an epoch; 0 for the epoch before the first."""
        while len(self._ends) <= epoch + 1:
            planned = len(self._ends) - 1
            if self._regular and planned:
                steps = self._ends[1]
            else:
                steps = -(-len(self._plan(planned)) // (self._shape[0] * self._shape[1]))
            self._ends.append(self._ends[-1] + steps)
        return self._ends[epoch + 1]

    def _epoch_of(self, step: int) -> tuple[int, int]:
        """The epoch that a step belongs to, and the first step of that epoch."""
        while self._ends[-1] <= step:
            self._end(len(self._ends) - 1)
        epoch = bisect_right(self._ends, step) - 1
        return epoch, self._ends[epoch]

    def _plan(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch, as numbers of examples."""
        if self._rows[0] != epoch:
            chosen = np.concatenate([self._chosen(source, epoch) for source in range(len(self._sources))])
            random = np.random.default_rng([self._seed, epoch, 0])
            random.shuffle(chosen)
            if self._packing:
                rows = [chosen[row].tolist() for row in pack(self._lengths[chosen], self.row_length)]
                rows = [rows[i] for i in random.permutation(len(rows))]
            else:
                rows = [[index] for index in chosen.tolist()]
            self._rows = (epoch, rows)
        return self._rows[1]

    def _chosen(self, source: int, epoch: int) -> np.ndarray:
        """The examples that a source gives to an epoch: the next ones of its endless shuffled passes."""
        size, share = len(self._sources[source]), self._shares[source]
        first, last = epoch * share, (epoch + 1) * share
        passes = range(first // size, -(-last // size))
        orders = [np.random.default_rng([self._seed, number, 1 + source]).permutation(size) for number in passes]
        offset = first - passes.start * size
        return np.concatenate(orders)[offset : offset + share] + self._first[source]

    def _example(self, index: int) -> Tokenized:
        source = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._sources[source][index - int(self._first[source])]


def stream(schedule: Schedule) -> grain.DatasetIterator:
    """An endless iterator that reads ahead. `get_state()` is JSON, and `set_state` goes on from there."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.source(schedule).to_iter_dataset(options))


def eval_batches(
    examples: TokenizedSet, *, batch_size: int, row_length: int, packing: bool, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Every example once: [1, batch_size, row_length]. Empty rows fill the last batch.

    Without packing examples stand in order, one to a row. With `rows`, only these of each batch are made.
    """
    lengths = examples.lengths
    full = pack(lengths, row_length) if packing else [[index] for index in range(len(lengths))]
    made = range(batch_size) if rows is None else rows
    for first in range(0, len(full), batch_size):
        wanted = [first + row for row in made]
        chosen = [[examples[index] for index in full[row]] if row < len(full) else [] for row in wanted]
        yield _fill(chosen, (1, len(made)), row_length)


def row_length(sources: Sequence[TokenizedSet], max_length: int, parts: int) -> int:
    """Tokens of a row that holds any one example, as `Schedule` has them without packing."""
    longest = max(int(source.lengths.max()) for source in sources)
    if longest > max_length:
        raise ValueError(f"an example has {longest} tokens; rows hold {max_length}")
    multiple = math.lcm(_MULTIPLE, parts)
    return min(-(-longest // multiple) * multiple, max_length)


def _shares(sources: Sequence[TokenizedSet], weights: Sequence[float] | None) -> list[int]:
    """Examples that each source gives to one epoch."""
    sizes = [len(source) for source in sources]
    if weights is None:
        return sizes
    if len(weights) != len(sizes) or min(weights) <= 0:
        raise ValueError(f"{len(sizes)} sources need as many weights above 0, not {list(weights)}")
    return [max(1, round(sum(sizes) * weight / sum(weights))) for weight in weights]


def _fill(rows: Sequence[Sequence[Tokenized]], shape: tuple[int, int], length: int) -> Batch:
    """Rows of examples as arrays [*shape, length]; rows that are missing are empty."""
    count = shape[0] * shape[1]
    tokens, segments, positions = (np.zeros((count, length), np.int32) for _ in range(3))
    mask = np.zeros((count, length), bool)
    for row, examples in enumerate(rows):
        start = 0
        for segment, example in enumerate(examples, 1):
            end = start + len(example.tokens)
            tokens[row, start:end] = example.tokens
            mask[row, start + 1 : end] = example.loss_mask[1:]
            segments[row, start:end] = segment
            positions[row, start:end] = np.arange(end - start)
            start = end
    return Batch(*(array.reshape(*shape, length) for array in (tokens, mask, segments, positions)))
