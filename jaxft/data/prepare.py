"""Turns the sources of a run into training and held-out examples, and accounts for every example.

read -> convert -> render and tokenize -> drop or cut what is too long, drop what teaches nothing -> hold
out. Everything happens before the first step, so that every fault in the data is found before time is spent
on a model. All bad records are named at once, or dropped and counted; parts of examples that are not trained on
are counted by name.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from jaxft.data.chat import Renderer, TooLong
from jaxft.data.conversations import Conversation, with_last_answer
from jaxft.data.events import Event, EventCount
from jaxft.data.formats import Example, convert
from jaxft.data.records import BadRecord
from jaxft.data.sources import read
from jaxft.data.splits import hold_out, identity, refuse_overlap
from jaxft.data.tokenized import Tokenized, TokenizedSet

logger = logging.getLogger(__name__)


class DatasetSpec(Protocol):
    """One source, as the config describes it."""

    path: str
    type: str | None
    split: str | None
    name: str | None
    weight: float | None
    columns: Mapping[str, str]
    max_examples: int | None


_SHOWN = 10  # bad records in one message
_MANY_TOO_LONG = 0.1  # of a source's examples: worth a warning


@dataclass(frozen=True)
class SourceReport:
    """The results for one source: counts of examples, and of the tokens of those that were kept."""

    path: str
    format: str
    read: int
    too_long: int  # dropped: longer than max_length
    truncated: int  # kept, cut to max_length
    nothing_to_learn: int  # dropped: no supervised token
    kept: int
    tokens: int
    supervised: int
    longest: int  # tokens of the longest example before any was dropped or cut
    bad: int = 0  # dropped: records that cannot be trained on
    bad_records: tuple[BadRecord, ...] = ()  # the first of them
    events: tuple[EventCount, ...] = ()  # of the examples kept

    @property
    def warnings(self) -> list[str]:
        """What the owner of the data should not overlook."""
        lines = [str(event) for event in self.events if event.lost]
        if self.too_long > _MANY_TOO_LONG * self.read:
            lines.append(f"{self.too_long} of {self.read} examples are longer than `max_length` and were dropped")
        if self.bad:
            lines.append(f"{self.bad} of {self.read} records are bad and were dropped:")
            lines += [f"  {bad.origin}: {bad.reason}" for bad in self.bad_records]
        return lines

    def __str__(self) -> str:
        dropped = f"{self.too_long} too long, {self.nothing_to_learn} with nothing to learn"
        dropped += f", {self.bad} bad" if self.bad else ""
        lines = [
            f"{self.path}: {self.format}",
            f"  {self.read} examples read, {self.kept} kept; dropped: {dropped}; cut: {self.truncated}",
            f"  {self.tokens} tokens, {self.supervised} of them learned; longest example {self.longest} tokens",
            *(f"  note: {event}" for event in self.events if not event.lost),
            *(f"  WARNING: {line}" for line in self.warnings),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """The account of all sources. `moved`: examples held out only because an equal one is."""

    sources: tuple[SourceReport, ...]
    eval_sources: tuple[SourceReport, ...]
    train: int
    held_out: int
    moved: int
    train_tokens: int
    train_supervised: int

    def __str__(self) -> str:
        lines = [str(source) for source in self.sources]
        lines += [f"held out: {source}" for source in self.eval_sources]
        moved = f" ({self.moved} of them beside an equal example)" if self.moved else ""
        lines.append(f"training on {self.train} examples, {self.train_tokens} tokens, {self.train_supervised} learned")
        lines.append(f"held out {self.held_out} examples{moved}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Prepared:
    """What a run trains on, one set per source, and what is held out: tokens and their examples."""

    train: tuple[TokenizedSet, ...]
    weights: tuple[float, ...] | None
    eval: TokenizedSet
    eval_examples: tuple[Example, ...]
    report: Report


def prepare(
    datasets: Sequence[DatasetSpec],
    renderer: Renderer,
    *,
    max_length: int,
    eval_datasets: Sequence[DatasetSpec] = (),
    val_set_size: int | float = 0,
    excess_length_strategy: Literal["drop", "truncate", "raise"] = "drop",
    assistant_only_loss: bool = True,
    mask_history: bool = False,
    on_bad_record: Literal["error", "drop"] = "error",
    strict_data: bool = False,
    seed: int = 0,
) -> Prepared:
    """Read, tokenize and split.

    Args:
        datasets: sources to train on; all with a weight, or none.
        renderer: tokenizer and chat template.
        max_length: tokens of the longest example.
        eval_datasets: sources to judge by; no example of theirs may be trained on.
        val_set_size: examples to hold out of `datasets` instead: a number, or a fraction below 1.
        excess_length_strategy: what happens to longer examples.
        assistant_only_loss: learn assistant turns and completions; False = every token.
        mask_history: learn the last answer of each conversation only.
        on_bad_record: what happens to records that cannot be trained on.
        strict_data: what an example says and is not trained on is an error.
        seed: decides which examples `val_set_size` holds out.

    Raises:
        ValueError: with file, line and reason for anything that cannot be trained on as it stands.
    """
    weights = _weights(datasets)
    if eval_datasets and val_set_size:
        raise ValueError("`eval_datasets` and `val_set_size` are both given; keep one")
    settings = (renderer, max_length, excess_length_strategy, assistant_only_loss, mask_history)
    loaded = [_load(dataset, *settings) for dataset in (*datasets, *eval_datasets)]
    bad = [record for source in loaded for record in source.bad]
    if bad and on_bad_record == "error":
        raise ValueError(_name_bad(bad, sum(source.report.read for source in loaded)))
    for source in loaded:
        _refuse_empty(source, max_length)
    lost = [f"{source.report.path}: {event}" for source in loaded for event in source.report.events if event.lost]
    if lost and strict_data:
        raise ValueError(
            "`strict_data` is true, and this of the data is not in what would be trained on:\n" + "\n".join(lost)
        )
    train, held_out = loaded[: len(datasets)], loaded[len(datasets) :]
    if mask_history and not any(isinstance(one, Conversation) for source in train for one in source.examples):
        logger.warning("mask_history has no effect: there are no conversations to train on")
    sets = [source.tokens for source in train]
    eval_tokens = [example for source in held_out for example in source.tokens]
    eval_examples = [example for source in held_out for example in source.examples]
    if eval_examples:
        refuse_overlap([example for source in train for example in source.examples], eval_examples)
    moved = 0
    if val_set_size:
        places = [(s, i) for s, source in enumerate(train) for i in range(len(source.examples))]
        split = hold_out([identity(train[s].examples[i]) for s, i in places], val_set_size, seed)
        chosen, moved = [places[k] for k in split.held_out], split.moved
        eval_tokens = [train[s].tokens[i] for s, i in chosen]
        eval_examples = [train[s].examples[i] for s, i in chosen]
        stay = [places[k] for k in split.train]
        sets = [TokenizedSet.of(source.tokens[i] for t, i in stay if t == s) for s, source in enumerate(train)]
        if empty := [source.report.path for source, left in zip(train, sets, strict=True) if not len(left)]:
            raise ValueError(f"{empty[0]}: `val_set_size` {val_set_size} holds out all of its examples")
    report = Report(
        tuple(source.report for source in train),
        tuple(source.report for source in held_out),
        sum(map(len, sets)),
        len(eval_tokens),
        moved,
        sum(len(examples.tokens) for examples in sets),
        sum(int(examples.loss_mask.sum()) for examples in sets),
    )
    return Prepared(tuple(sets), weights, TokenizedSet.of(eval_tokens), tuple(eval_examples), report)


class _Loaded(NamedTuple):
    """One source: an example and its tokens at each index, and the records that cannot be one."""

    examples: list[Example]
    tokens: TokenizedSet
    bad: list[BadRecord]
    report: SourceReport


def _load(
    dataset: DatasetSpec,
    renderer: Renderer,
    max_length: int,
    excess_length_strategy: Literal["drop", "truncate", "raise"],
    assistant_only_loss: bool,
    mask_history: bool,
) -> _Loaded:
    records = read(dataset.path, split=dataset.split, name=dataset.name, max_examples=dataset.max_examples)
    format, examples, bad = convert(
        records,
        chat=renderer.template is not None,
        type=dataset.type,
        columns=dataset.columns,
        is_rendered=renderer.is_rendered,
    )
    if mask_history:
        examples = [with_last_answer(one) if isinstance(one, Conversation) else one for one in examples]
    kept: list[Example] = []
    tokens: list[Tokenized] = []
    happened: list[tuple[str, Iterable[Event]]] = []
    too_long = truncated = nothing = longest = 0
    for example, one in zip(examples, renderer.encode(examples, assistant_only_loss=assistant_only_loss), strict=True):
        if isinstance(one, BadRecord):
            bad.append(one)
            continue
        length = None if isinstance(one, TooLong) else len(one.tokenized.tokens)
        longest = max(longest, length or 0)
        excess = length is None or length > max_length
        if excess and excess_length_strategy == "raise":
            size = f"more than {one.characters} characters" if length is None else f"{length} tokens"
            raise ValueError(
                f"{example.origin}: {size}, but `max_length` is {max_length}; raise it, or "
                "set `excess_length_strategy` to drop or truncate"
            )
        if length is None or (excess and excess_length_strategy == "drop"):
            too_long += 1
            continue
        cut = Tokenized(one.tokenized.tokens[:max_length], one.tokenized.loss_mask[:max_length])
        if not cut.loss_mask.any():
            nothing += 1
            continue
        truncated += excess
        happened.append((example.origin, one.events))
        kept.append(example)
        tokens.append(cut)
    flat = TokenizedSet.of(tokens)
    counts = (len(records), too_long, truncated, nothing, len(kept))
    sums = (len(flat.tokens), int(flat.loss_mask.sum()), longest)
    format = "; ".join([format, *records.notes])
    report = SourceReport(dataset.path, format, *counts, *sums, len(bad), tuple(bad[:_SHOWN]), EventCount.of(happened))
    return _Loaded(kept, flat, bad, report)


def _name_bad(bad: Sequence[BadRecord], total: int) -> str:
    """All bad records in one message: the first with their reasons, and how many there are."""
    alike = len(bad) == total and len({record.reason for record in bad}) == 1
    shown = bad[: 1 if alike else _SHOWN]
    lines = [f"{record.origin}: {record.reason}" for record in shown]
    if len(bad) > len(shown):
        lines.append("... the others alike" if alike else f"... and {len(bad) - len(shown)} more")
    if total > 1:
        lines.append(f"{len(bad)} of {total} records are bad; mend them, or set `on_bad_record: drop`")
    return "\n".join(lines)


def _refuse_empty(source: _Loaded, max_length: int) -> None:
    report = source.report
    if not report.kept:
        raise ValueError(
            f"{report.path}: none of {report.read} examples is left: {report.too_long} are longer than "
            f"`max_length` {max_length} (the longest has {report.longest} tokens), {report.nothing_to_learn} have no "
            f"token to learn, {report.bad} are bad"
            + "".join(f"\n  {b.origin}: {b.reason}" for b in source.bad[:_SHOWN])
        )


def _weights(datasets: Sequence[DatasetSpec]) -> tuple[float, ...] | None:
    weights = [dataset.weight for dataset in datasets]
    if None in weights and any(weight is not None for weight in weights):
        without = [dataset.path for dataset in datasets if dataset.weight is None]
        raise ValueError(f"{without[0]}: no `weight`, but other datasets have one; give all of them one, or none")
    return None if None in weights else tuple(weights)
