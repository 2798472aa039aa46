import numpy as np
import pytest

from jaxft.data.tokenized import Tokenized, TokenizedSet, check_vocabulary


def example(*tokens: int, learned: int = 1) -> Tokenized:
    mask = np.zeros(len(tokens), bool)
    mask[len(tokens) - learned :] = True
    return Tokenized(np.array(tokens, np.int32), mask)


def test_flat_storage_gives_back_what_went_in():
    examples = [example(5, 6, 7), example(8, 9, learned=2), example(1)]
    flat = TokenizedSet.of(examples)
    assert flat.offsets.tolist() == [0, 3, 5, 6]
    assert flat.lengths.tolist() == [3, 2, 1]
    assert flat.tokens.dtype == np.int32
    for stored, original in zip(flat, examples, strict=True):
        np.testing.assert_array_equal(stored.tokens, original.tokens)
        np.testing.assert_array_equal(stored.loss_mask, original.loss_mask)


def test_empty_set():
    assert len(TokenizedSet.of([])) == 0


def test_fingerprint_sees_tokens_masks_borders_and_order():
    sets = [
        TokenizedSet.of([example(5, 6), example(7, 8)]),
        TokenizedSet.of([example(5, 6), example(7, 9)]),
        TokenizedSet.of([example(5, 6), example(7, 8, learned=2)]),
        TokenizedSet.of([example(5, 6, 7), example(8)]),
        TokenizedSet.of([example(7, 8), example(5, 6)]),
    ]
    assert len({one.fingerprint() for one in sets}) == len(sets)
    assert sets[0].fingerprint() == TokenizedSet.of([example(5, 6), example(7, 8)]).fingerprint()


def test_vocabulary_check_names_both_numbers():
    sets = [TokenizedSet.of([]), TokenizedSet.of([example(3, 49151)])]
    check_vocabulary(sets, 49152)
    with pytest.raises(ValueError, match=r"token 49151.*49151 rows"):
        check_vocabulary(sets, 49151)
