import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.data.packing import pack

ROW = 64


def naive_best_fit_decreasing(lengths: list[int], row_length: int) -> list[int]:
    """Sum of each row, by the textbook: try every row and take the one that is left with least room."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(row_length - used - length, i) for i, used in enumerate(rows) if used + length <= row_length]
        if fitting:
            rows[min(fitting)[1]] += length
        else:
            rows.append(length)
    return rows


@given(st.lists(st.integers(1, ROW), max_size=80))
def test_every_example_once_and_as_tight_as_the_textbook(lengths):
    rows = pack(lengths, ROW)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    used = [sum(lengths[index] for index in row) for row in rows]
    assert all(total <= ROW for total in used)
    assert sorted(used) == sorted(naive_best_fit_decreasing(lengths, ROW))


@given(st.lists(st.integers(1, ROW), min_size=1, max_size=40), st.randoms())
def test_row_count_does_not_depend_on_order(lengths, random):
    shuffled = random.sample(lengths, len(lengths))
    assert len(pack(lengths, ROW)) == len(pack(shuffled, ROW))
    assert pack(lengths, ROW) == pack(np.array(lengths), ROW)


def test_equal_lengths_follow_the_given_order():
    assert pack([4, 4, 4, 4], 8) == [[0, 1], [2, 3]]


def test_a_hundred_thousand_examples_leave_hardly_any_room():
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5.5, 1.0, 100_000).astype(int), 1, 2048)
    rows = pack(lengths, 2048)
    assert len(rows) <= 1.001 * lengths.sum() / 2048 + 1


@pytest.mark.parametrize("length", [0, -1, 9])
def test_lengths_that_no_row_holds(length):
    with pytest.raises(ValueError, match=f"example 1 has {length} tokens; a row holds 1 to 8"):
        pack([3, length], 8)
