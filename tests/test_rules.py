"""First match wins, every name is covered, every rule decides something."""

import pytest

from jaxft.rules import assign

NAMES = ["model.embed.weight", "model.layers.q_proj.weight", "model.layers.norm.weight", "lm_head.weight"]

pytestmark = pytest.mark.core


def test_the_first_rule_that_matches_decides():
    rules = [("norm", "a"), (r"layers\.", "b"), (r"^lm_head", "c"), ("", "d")]
    assert assign(rules, NAMES) == dict(zip(NAMES, ["d", "b", "a", "c"], strict=True))
    swapped = [rules[1], rules[0], *rules[2:]]
    assert assign(swapped, NAMES, may_be_idle=True)[NAMES[2]] == "b"


def test_patterns_are_searched_anywhere_and_anchors_bind_them():
    assert assign([("q_proj", 1)], ["a.q_proj.b"]) == {"a.q_proj.b": 1}
    assert assign([(r"^q_proj", 1), ("", 2)], ["a.q_proj", "q_proj"]) == {"a.q_proj": 2, "q_proj": 1}
    assert assign([(r"proj$", 1), ("", 2)], ["proj.a", "a.proj"]) == {"proj.a": 2, "a.proj": 1}


def test_names_keep_their_order_and_values_their_identity():
    value = object()
    found = assign([("", value)], (name for name in reversed(NAMES)))
    assert list(found) == NAMES[::-1]
    assert all(given is value for given in found.values())


def test_a_name_that_no_rule_covers_is_an_error():
    with pytest.raises(ValueError, match=r"no rule covers 'model\.embed\.weight'; rules: layers, lm_head"):
        assign([("layers", 1), ("lm_head", 2)], NAMES)


@pytest.mark.parametrize(
    "rules, idle",
    [
        ([("q_porj", 1), ("", 2)], "q_porj"),
        ([("", 1), ("norm", 2), ("lm_head", 3)], "norm, lm_head"),  # too late to decide
    ],
)
def test_a_rule_that_decides_nothing_is_an_error_unless_it_may(rules, idle):
    with pytest.raises(ValueError, match=f"rules that decide nothing: {idle}; names: {', '.join(NAMES)}"):
        assign(rules, NAMES)
    assert assign(rules, NAMES, may_be_idle=True) == dict.fromkeys(NAMES, rules[-1][1] if idle == "q_porj" else 1)


def test_no_names_need_no_rules():
    assert assign([], []) == {}
    with pytest.raises(ValueError, match="decide nothing: x"):
        assign([("x", 1)], [])
