"""From the sources a run names to what it trains on and what it is judged by, every example accounted for.

read -> convert -> render and tokenize -> drop or cut what is too long, drop what teaches nothing -> hold
out. Everything happens before the first step, so that every fault in the data is found before time is spent
on a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from jaxft.data.chat import Renderer
from jaxft.data.formats import Example, convert
from jaxft.data.sources import read
from jaxft.data.splits import hold_out, identity, refuse_overlap
from jaxft.data.tokenized import Tokenized, TokenizedSet


class DatasetSpec(Protocol):
    """One source, as the config describes it."""

    path: str
    type: str | None
    split: str | None
    name: str | None
    weight: float | None
    columns: Mapping[str, str]
    max_examples: int | None


@dataclass(frozen=True)
class SourceReport:
    """What became of one source: counts of examples, and of the tokens of those that were kept."""

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

    def __str__(self) -> str:
        dropped = f"{self.too_long} too long, {self.nothing_to_learn} with nothing to learn"
        learned = f"{self.supervised} of them learned"
        return (
            f"{self.path}: {self.format}\n"
            f"  {self.read} examples read, {self.kept} kept; dropped: {dropped}; cut: {self.truncated}\n"
            f"  {self.tokens} tokens, {learned}; longest example {self.longest} tokens"
        )


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
        seed: decides which examples `val_set_size` holds out.

    Raises:
        ValueError: with file, line and reason for anything that cannot be trained on as it stands.
    """
    weights = _weights(datasets)
    if eval_datasets and val_set_size:
        raise ValueError("`eval_datasets` and `val_set_size` are both given; keep one")
    settings = (renderer, max_length, excess_length_strategy, assistant_only_loss)
    train = [_load(dataset, *settings) for dataset in datasets]
    held_out = [_load(dataset, *settings) for dataset in eval_datasets]
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
    """One source: an example and its tokens at each index."""

    examples: list[Example]
    tokens: TokenizedSet
    report: SourceReport


def _load(
    dataset: DatasetSpec,
    renderer: Renderer,
    max_length: int,
    excess_length_strategy: Literal["drop", "truncate", "raise"],
    assistant_only_loss: bool,
) -> _Loaded:
    records = read(dataset.path, split=dataset.split, name=dataset.name, max_examples=dataset.max_examples)
    chat = renderer.template is not None
    format, examples = convert(records, chat=chat, type=dataset.type, columns=dataset.columns)
    encoded = renderer.encode(examples, assistant_only_loss=assistant_only_loss)
    kept: list[Example] = []
    tokens: list[Tokenized] = []
    too_long = truncated = nothing = 0
    for example, one in zip(examples, encoded, strict=True):
        excess = len(one.tokens) > max_length
        if excess and excess_length_strategy == "raise":
            raise ValueError(
                f"{example.origin}: {len(one.tokens)} tokens, but `max_length` is {max_length}; raise it, or "
                "set `excess_length_strategy` to drop or truncate"
            )
        if excess and excess_length_strategy == "drop":
            too_long += 1
            continue
        one = Tokenized(one.tokens[:max_length], one.loss_mask[:max_length])
        if not one.loss_mask.any():
            nothing += 1
            continue
        truncated += excess
        kept.append(example)
        tokens.append(one)
    longest = max(len(one.tokens) for one in encoded)
    if not kept:
        raise ValueError(
            f"{dataset.path}: none of {len(examples)} examples is left: {too_long} are longer than "
            f"`max_length` {max_length} (the longest has {longest} tokens), {nothing} have no token to learn"
        )
    flat = TokenizedSet.of(tokens)
    counts = (len(records), too_long, truncated, nothing, len(kept))
    sums = (len(flat.tokens), int(flat.loss_mask.sum()), longest)
    return _Loaded(kept, flat, SourceReport(dataset.path, format, *counts, *sums))


def _weights(datasets: Sequence[DatasetSpec]) -> tuple[float, ...] | None:
    weights = [dataset.weight for dataset in datasets]
    if None in weights and any(weight is not None for weight in weights):
        without = [dataset.path for dataset in datasets if dataset.weight is None]
        raise ValueError(f"{without[0]}: no `weight`, but other datasets have one; give all of them one, or none")
    return None if None in weights else tuple(weights)
