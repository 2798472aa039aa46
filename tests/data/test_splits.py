import random

import pytest

from jaxft.data.conversations import Conversation, Message
from jaxft.data.formats import Completion, Text
from jaxft.data.splits import hold_out, identity, refuse_overlap


def talk(question: str, answer: str, origin: str = "", **options) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer, **options)), origin=origin)


def test_identity_is_what_an_example_says():
    same = [talk("q", "a"), talk(" q\n", "a "), talk("q", "a", origin="f:7"), talk("q", "a", supervised=True)]
    assert len({identity(example) for example in same}) == 1
    others = [
        talk("q", "b"),
        talk("qa", " "),
        Conversation((*same[0].messages, Message("user", "r"))),
        Conversation(same[0].messages, ({"function": {"name": "f"}},)),
        Conversation((Message("system", "q"), Message("user", "a"))),
        Completion("q", "a"),
        Completion("qa", ""),
        Text("qa"),
    ]
    assert len({identity(example) for example in [same[0], *others]}) == len(others) + 1


def test_equal_examples_stay_on_one_side():
    examples = [Text(str(i % 60)) for i in range(100)]  # 0 to 39 twice, 40 to 59 once
    identities = [identity(example) for example in examples]
    split = hold_out(identities, 20, seed=1)
    assert sorted(split.train + split.held_out) == list(range(100))
    held_out = [examples[i].text for i in split.held_out]
    assert not set(held_out) & {examples[i].text for i in split.train}
    assert split.moved == len(held_out) - len(set(held_out)) > 0
    assert len(held_out) in (20, 21)


def test_choice_depends_on_content_and_seed_not_on_order_or_number():
    texts = [f"text {i}" for i in range(200)]
    chosen = {texts[i] for i in hold_out([identity(Text(text)) for text in texts], 30, seed=1).held_out}
    shuffled = random.Random(0).sample(texts, 200)
    again = hold_out([identity(Text(text)) for text in shuffled], 30, seed=1)
    assert {shuffled[i] for i in again.held_out} == chosen
    fewer = hold_out([identity(Text(text)) for text in texts], 10, seed=1)
    assert {texts[i] for i in fewer.held_out} < chosen
    other = hold_out([identity(Text(text)) for text in texts], 30, seed=2)
    assert {texts[i] for i in other.held_out} != chosen


def test_fractions():
    identities = [identity(Text(str(i))) for i in range(40)]
    assert len(hold_out(identities, 0.1, seed=0).held_out) == 4


@pytest.mark.parametrize(
    "size, count, reason",
    [(10, 10, "none to train on"), (11, 10, "none to train on"), (0.01, 10, "none held out")],
)
def test_sizes_that_leave_a_side_empty(size, count, reason):
    with pytest.raises(ValueError, match=f"`val_set_size` {size} of 10 examples leaves {reason}"):
        hold_out([identity(Text(str(i))) for i in range(count)], size, seed=0)


def test_nothing_is_left_when_all_examples_are_equal():
    with pytest.raises(ValueError, match="too many are equal"):
        hold_out([identity(Text("t"))] * 10, 2, seed=0)


def test_overlap_names_both_sides():
    train = [talk(str(i), "a", origin=f"train:{i}") for i in range(10)]
    refuse_overlap(train, [talk("10", "a"), talk("0", "b")])
    held_out = [talk(f" {i}", "a", origin=f"test:{i}") for i in range(3, 12)]
    with pytest.raises(ValueError, match=r"^7 held-out .*\(train:3 = test:3; .*; train:5 = test:5, \.\.\.\)"):
        refuse_overlap(train, held_out)
