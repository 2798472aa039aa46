import json
from collections import Counter
from itertools import islice

import jax
import numpy as np
import pytest

from jaxft.data.batch import Batch
from jaxft.data.loader import Schedule, eval_batches, row_length, stream
from jaxft.data.packing import pack
from jaxft.data.tokenized import Tokenized, TokenizedSet

LONGEST = 50


def source(count: int, first: int = 1, seed: int = 0) -> TokenizedSet:
    """Example number n, from `first` on, says its own number over and over, in 2 to 50 tokens."""
    random = np.random.default_rng(seed)
    sizes = random.integers(2, LONGEST + 1, count)
    return TokenizedSet.of(
        Tokenized(np.full(size, first + i, np.int32), np.arange(size) >= min(size - 1, 3))
        for i, size in enumerate(sizes)
    )


def schedule(sources=None, **options) -> Schedule:
    defaults = {"micro_batch_size": 3, "accumulation_steps": 2, "max_length": 64, "packing": True, "seed": 7}
    return Schedule(sources or [source(61)], **{**defaults, **options})


def examples_in(batch: Batch) -> list[int]:
    """The number of each example in a batch, after checking all that must hold for its row."""
    found = []
    rows = zip(*(array.reshape(-1, array.shape[-1]) for array in batch), strict=True)
    for tokens, mask, segments, positions in rows:
        used = int((segments > 0).sum())
        assert (segments[:used] > 0).all()
        assert not tokens[used:].any()
        assert not mask[used:].any()
        assert not positions[used:].any()
        assert sorted(set(segments[:used])) == list(range(1, int(segments.max()) + 1))
        for segment in range(1, int(segments.max()) + 1):
            where = np.flatnonzero(segments == segment)
            assert where.tolist() == list(range(where[0], where[-1] + 1))
            assert positions[where].tolist() == list(range(len(where)))
            assert len(set(tokens[where])) == 1
            assert not mask[where[0]]
            assert mask[where].tolist() == [i >= min(len(where) - 1, 3) for i in range(len(where))]
            found.append(int(tokens[where[0]]))
    return found


def epoch_of(plan: Schedule, epoch: int) -> list[int]:
    return [n for step in range(plan.steps(epoch), plan.steps(epoch + 1)) for n in examples_in(plan[step])]


@pytest.mark.parametrize("packing", [True, False])
def test_every_epoch_holds_every_example_once_in_another_order(packing):
    plan = schedule(packing=packing)
    epochs = [epoch_of(plan, epoch) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(1, 62)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    rows = len(pack(source(61).lengths, 64)) if packing else 61
    assert plan.steps() == -(-rows // 6)
    assert plan.steps(3) == 3 * plan.steps()


def test_batches_have_one_shape():
    assert [(array.shape, array.dtype) for array in schedule()[0]] == [
        ((2, 3, 64), dtype) for dtype in (np.int32, np.bool_, np.int32, np.int32)
    ]
    assert schedule(packing=False, max_length=64)[0].tokens.shape == (2, 3, 64)  # capped
    assert schedule(packing=False, max_length=1000)[0].tokens.shape == (2, 3, 128)  # rounded up
    assert len(jax.tree.leaves(schedule()[0])) == 4


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
def test_examples_seen_are_those_of_the_batches(packing, weights):
    plan = schedule([source(40), source(15, first=100)], packing=packing, weights=weights)
    seen = 0
    for step in range(plan.steps(2) + 3):
        assert plan.examples(step) == seen
        seen += len(examples_in(plan[step]))


def test_the_first_token_of_a_segment_is_never_supervised():
    everything = TokenizedSet.of([Tokenized(np.full(4, n, np.int32), np.ones(4, bool)) for n in (1, 2, 3)])
    batch = schedule([everything], micro_batch_size=1, accumulation_steps=1, max_length=16)[0]
    assert batch.loss_mask[0, 0].tolist() == [False, True, True, True] * 3 + [False] * 4


@pytest.mark.parametrize("packing", [True, False])
def test_padding_is_told_by_its_place_and_not_by_its_id(packing):
    """Examples that hold and end with token 0, which also fills rows, as where a tokenizer pads with EOS."""
    texts = [[5, 0, 6, 0], [0, 7, 0]]
    ends = TokenizedSet.of([Tokenized(np.array(text, np.int32), np.arange(len(text)) > 0) for text in texts])
    options = {"micro_batch_size": 2, "accumulation_steps": 1, "max_length": 9, "packing": packing}
    (row, other) = zip(*(array[0] for array in schedule([ends], **options)[0]), strict=True)
    found = []
    for tokens, mask, segments, positions in (row, other):
        for segment in range(1, segments.max() + 1):
            where = segments == segment
            found.append(tokens[where].tolist())
            assert mask[where].tolist() == [False] + [True] * (where.sum() - 1)
            assert positions[where].tolist() == list(range(where.sum()))
        assert not mask[segments == 0].any()
    assert sorted(found) == sorted(texts)


def test_order_is_fixed_by_the_seed():
    for step in (0, 5, 30):
        assert all(map(np.array_equal, schedule()[step], schedule()[step]))
    assert epoch_of(schedule(seed=7), 0) != epoch_of(schedule(seed=8), 0)


def test_steps_may_be_asked_in_any_order():
    forward = schedule()
    batches = [forward[step].tokens for step in range(25)]
    backward = schedule()
    for step in reversed(range(25)):
        np.testing.assert_array_equal(backward[step].tokens, batches[step])


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0]])
def test_resuming_anywhere_gives_the_rest_of_the_run(packing, weights):
    def fresh():
        return schedule([source(40), source(15, first=100)], packing=packing, weights=weights)

    total = fresh().steps(3)
    straight = list(islice(stream(fresh()), total))
    for taken in (0, 1, fresh().steps(1) - 1, fresh().steps(1), fresh().steps(2) + 1):
        before = stream(fresh())
        for _ in range(taken):
            next(before)
        state = json.loads(json.dumps(before.get_state()))
        after = stream(fresh())
        after.set_state(state)
        for expected in straight[taken:]:
            assert all(map(np.array_equal, next(after), expected))


def test_weights_give_shares_and_large_sources_go_on_where_they_stopped():
    large, small = source(90), source(10, first=1000)
    plan = schedule([large, small], packing=False, weights=[1.0, 3.0])
    epochs = [epoch_of(plan, epoch) for epoch in range(4)]
    for epoch in epochs:
        assert sum(n < 1000 for n in epoch) == 25
        repeats = Counter(n for n in epoch if n >= 1000)
        assert sum(repeats.values()) == 75
        assert set(repeats.values()) <= {7, 8}
    seen = [n for epoch in epochs for n in epoch if n < 1000]
    assert len(set(seen[:75])) == 75  # three epochs without a repetition
    assert set(seen) == set(range(1, 91))
    assert max(Counter(seen).values()) == 2


def test_parts_of_epochs():
    plan = schedule(micro_batch_size=1, accumulation_steps=1, packing=False)
    assert plan.steps(0.5) == 31
    assert plan.steps(2.25) == 2 * 61 + 16
    assert plan.epoch(0) == 0
    assert plan.epoch(61) == 1
    assert plan.epoch(61 + 30) == pytest.approx(1 + 30 / 61)


def test_steps_add_up_when_epochs_differ_in_length():
    plan = schedule(
        [source(30), source(50, first=100, seed=3)],
        weights=[5.0, 1.0],
        micro_batch_size=1,
        accumulation_steps=1,
    )
    lengths = [plan.steps(epoch + 1) - plan.steps(epoch) for epoch in range(12)]
    assert len(set(lengths)) > 1
    for epoch in (0, 5, 11):
        assert len(epoch_of(plan, epoch)) == 80


def test_fingerprint_sees_all_that_decides_the_order():
    variants = [
        schedule(),
        schedule(seed=8),
        schedule(packing=False),
        schedule(max_length=65),
        schedule([source(61, seed=1)]),
        schedule([source(30), source(31, first=31)]),
        schedule([source(30), source(31, first=31)], weights=[1.0, 2.0]),
    ]
    assert len({plan.fingerprint() for plan in variants}) == len(variants)
    assert schedule().fingerprint() == schedule().fingerprint()
    for same in ({"micro_batch_size": 2}, {"accumulation_steps": 1}):
        assert schedule().fingerprint() == schedule(**same).fingerprint(), "rows of a step are told apart by themselves"
    loose = [schedule(packing=False, max_length=1000, parts=parts) for parts in (1, 3)]
    assert loose[0].row_length != loose[1].row_length
    assert loose[0].fingerprint() == loose[1].fingerprint(), "what is padded is not learned"


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
def test_a_step_learns_the_same_however_its_rows_are_cut(packing, weights):
    """Twelve rows: (rows of a micro-batch, micro-batches); a stream may go on with another cut."""
    shapes = [(12, 1), (6, 2), (4, 3), (1, 12)]
    settings = {"packing": packing, "weights": weights, "max_length": 64}
    plans = [
        schedule([source(31), source(30, first=32)], micro_batch_size=rows, accumulation_steps=steps, **settings)
        for rows, steps in shapes
    ]
    first = plans[0]
    for shape, plan in zip(shapes, plans, strict=True):
        assert plan.steps(2.5) == first.steps(2.5)
        for step in range(first.steps(2)):
            for field, expected in zip(plan[step], first[step], strict=True):
                assert field.shape[:2] == shape[::-1]
                np.testing.assert_array_equal(field.reshape(expected.shape), expected)

    one, other = stream(plans[1]), stream(plans[2])
    for _ in range(4):
        next(one)
    other.set_state(json.loads(json.dumps(one.get_state())))
    for _ in range(3):
        assert examples_in(next(other)) == examples_in(next(one))


def test_eval_batches_keep_order_and_drop_nothing():
    examples = source(10)
    batches = list(eval_batches(examples, batch_size=4, row_length=128, packing=False))
    assert [batch.tokens.shape for batch in batches] == [(1, 4, 128)] * 3
    assert [n for batch in batches for n in examples_in(batch)] == list(range(1, 11))
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == int(examples.loss_mask.sum())


@pytest.mark.parametrize("row_length", [50, 61, 128, 1000])
def test_packed_eval_batches_hold_every_example_once(row_length):
    examples = source(10)
    batches = list(eval_batches(examples, batch_size=2, row_length=row_length, packing=True))
    assert {batch.tokens.shape for batch in batches} == {(1, 2, row_length)}
    assert sorted(n for batch in batches for n in examples_in(batch)) == list(range(1, 11))
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == int(examples.loss_mask.sum())
    rows = sum(int((batch.segment_ids > 0).any(axis=-1).sum()) for batch in batches)
    assert rows == len(pack(examples.lengths, row_length))
    assert len(batches) == -(-rows // 2)


@pytest.mark.parametrize(
    ("max_length", "parts", "length"), [(1000, 2, 128), (1000, 5, 640), (50, 5, 50), (384, 96, 384)]
)
def test_rows_can_be_cut_into_parts(max_length, parts, length):
    """Rows of the longest example, 50 tokens, rounded up to 128 and to what can be cut."""
    assert schedule(max_length=max_length, packing=False, parts=parts).row_length == length
    assert row_length([source(4)], max_length, parts) == length


def test_what_cannot_be_scheduled():
    with pytest.raises(ValueError, match="2 sources need as many weights above 0"):
        schedule([source(3), source(3)], weights=[1.0])
    with pytest.raises(ValueError, match="weights above 0"):
        schedule([source(3), source(3)], weights=[1.0, 0.0])
    with pytest.raises(ValueError, match="a source has no examples"):
        schedule([source(3), TokenizedSet.of([])])
    for packing in (True, False):
        with pytest.raises(ValueError, match="tokens; "):
            schedule(max_length=20, packing=packing)[0]


def test_parts_of_the_rows_make_up_the_batches():
    whole = schedule(micro_batch_size=6, accumulation_steps=2)
    parts = [schedule(micro_batch_size=6, accumulation_steps=2, rows=rows) for rows in ([0, 1, 4], [2, 3], [5])]
    assert {part.fingerprint() for part in parts} == {whole.fingerprint()}
    for step in range(whole.steps(2)):
        together = [np.concatenate(fields, axis=1) for fields in zip(*(part[step] for part in parts), strict=True)]
        for field, expected in zip(together, whole[step], strict=True):
            np.testing.assert_array_equal(field[:, [0, 1, 3, 4, 2, 5]], expected)


@pytest.mark.parametrize("packing", [True, False])
def test_parts_of_held_out_rows_make_up_the_batches(packing):
    examples = source(20)
    options = {"batch_size": 4, "row_length": 64, "packing": packing}
    parts = [list(eval_batches(examples, **options, rows=rows)) for rows in ([0, 3], [1, 2])]
    for number, whole in enumerate(eval_batches(examples, **options)):
        for field, *pieces in zip(whole, *(part[number] for part in parts), strict=True):
            np.testing.assert_array_equal(field[:, [0, 3, 1, 2]], np.concatenate(pieces, axis=1))
    assert len(parts[0]) == len(parts[1]) == number + 1 >= 2
