"""Layers of any arrangement in few groups: nothing lost, nothing reordered, the real arrangements in one or two."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.models.config import DecoderConfig, LayerSpec, Rope, layer_groups

FULL, LOCAL, WIDE = LayerSpec(), LayerSpec(window=4), LayerSpec(window=8)

pytestmark = pytest.mark.core


def shapes(layers) -> list[tuple[int, int, int]]:
    return [(group.start, len(group.pattern), group.repeats) for group in layer_groups(tuple(layers))]


@given(st.lists(st.sampled_from([FULL, LOCAL, WIDE]), max_size=40))
def test_groups_are_the_layers_in_their_order(layers):
    groups = layer_groups(tuple(layers))
    assert [spec for group in groups for spec in group.pattern * group.repeats] == layers
    starts = [group.start for group in groups]
    assert starts == [sum(len(g.pattern) * g.repeats for g in groups[:i]) for i in range(len(groups))]


@given(st.lists(st.sampled_from([FULL, LOCAL]), min_size=1, max_size=40))
def test_every_layer_has_one_place_and_its_own_spec(layers):
    places = {}
    for group in layer_groups(tuple(layers)):
        for position, spec in enumerate(group.pattern):
            at = group.layers_at(position)
            assert len(at) == group.repeats
            for layer in at:
                assert layer not in places
                places[layer] = spec
    assert [places[layer] for layer in range(len(layers))] == layers


@given(
    st.lists(st.sampled_from([FULL, LOCAL, WIDE]), min_size=1, max_size=6),
    st.integers(2, 8),
)
def test_a_repeated_pattern_is_one_group_no_longer_than_it(pattern, repeats):
    (group,) = layer_groups(tuple(pattern * repeats))
    assert len(group.pattern) <= len(pattern)
    assert len(pattern) % len(group.pattern) == 0


@pytest.mark.parametrize(
    "layers, expected",
    [
        ([], []),
        ([LOCAL], [(0, 1, 1)]),
        ([FULL] * 32, [(0, 1, 32)]),
        ([LOCAL, FULL] * 13, [(0, 2, 13)]),  # Gemma 2 2B
        (([LOCAL] * 5 + [FULL]) * 5 + [LOCAL] * 4, [(0, 6, 5), (30, 1, 4)]),  # Gemma 3 4B
        ([FULL] + [LOCAL] * 9, [(0, 1, 1), (1, 1, 9)]),
        ([FULL, LOCAL, WIDE], [(0, 1, 1), (1, 1, 1), (2, 1, 1)]),
    ],
)
def test_arrangements_of_real_models(layers, expected):
    assert shapes(layers) == expected


def test_layers_at():
    first, rest = layer_groups((FULL, LOCAL, LOCAL, FULL, LOCAL, LOCAL, WIDE))
    assert [list(first.layers_at(position)) for position in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert list(rest.layers_at(0)) == [6]


def test_a_config_is_a_value():
    """Equal configs are equal, hash alike and group alike, so that they may be static arguments of a program."""
    settings = {
        "vocab_size": 9,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 4,
        "layers": (LOCAL, FULL) * 2,
        "rope": Rope(1e4, 4, 16),
        "norm_eps": 1e-6,
    }
    first, second = DecoderConfig(**settings), DecoderConfig(**settings)
    assert first.groups == layer_groups((LOCAL, FULL) * 2)
    assert first == second
    assert hash(first) == hash(second)
    other = dataclasses.replace(first, layers=(FULL, LOCAL) * 2)
    assert other != first
    assert other.groups != first.groups
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.vocab_size = 10
