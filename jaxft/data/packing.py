"""Best-fit packing: many short examples share rows of one length.

Longest first, every example goes into the row that it fills best; where none has room, a new row begins. The
number of rows depends on the lengths alone. Among examples of equal length the order given decides, so that
shuffling first makes other rows at every epoch.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[list[int]]:
    """Rows of example indices, each index once, with no row longer than `row_length` tokens.

    O(n log n), plus at most `row_length` different amounts of room to keep sorted.

    Raises:
        ValueError: a length below 1 or above `row_length`.

    >>> pack([3, 6, 5, 2], 8)
    [[1, 3], [2, 0]]
    """
    lengths = np.asarray(lengths, np.int64)
    bad = np.flatnonzero((lengths < 1) | (lengths > row_length))
    if bad.size:
        raise ValueError(f"example {bad[0]} has {lengths[bad[0]]} tokens; a row holds 1 to {row_length}")
    rows: list[list[int]] = []
    rooms: list[int] = []  # the different amounts of room left, ascending
    rows_with: dict[int, list[int]] = {}  # room left -> rows
    sizes = lengths.tolist()
    for index in np.argsort(-lengths, kind="stable").tolist():
        size = sizes[index]
        best = bisect_left(rooms, size)
        if best == len(rooms):
            row, room = len(rows), row_length
            rows.append([])
        else:
            room = rooms[best]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[best]
        rows[row].append(index)
        if left := room - size:
            if not rows_with.setdefault(left, []):
                insort(rooms, left)
            rows_with[left].append(row)
    return rows
