"""The input of one update."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of examples, each array [accum, batch, T].

    segment_ids: 1, 2, ... for the examples of a row, 0 for padding. positions: from 0 within each example.
    loss_mask: token t is to be predicted from those before it in its segment; never so for a segment's first.
    """

    tokens: np.ndarray  # int32
    loss_mask: np.ndarray  # bool
    segment_ids: np.ndarray  # int32
    positions: np.ndarray  # int32
