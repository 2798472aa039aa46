"""Which modules are chosen, and with which rank and alpha: beside PEFT's own rules; and what is refused."""

import pytest

from jaxft.adapters.targets import LoraConfig

BLOCKS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
LAYERS = [
    f"model.layers.{layer}.{block}.{name}" for layer in range(12) for block, names in BLOCKS.items() for name in names
]
MODULES = [*LAYERS, "lm_head"]
FOLDED = ", ".join(dict.fromkeys(f"model.layers.*.{name.split('.', 3)[3]}" for name in LAYERS)) + ", lm_head"


def config(**settings) -> LoraConfig:
    return LoraConfig(**{"r": 8, "lora_alpha": 16} | settings)


CHOICES = {
    "names": {"target_modules": ["q_proj", "v_proj"]},
    "suffix": {"target_modules": ["self_attn.q_proj", "layers.1.mlp.up_proj"]},
    "whole name": {"target_modules": ["model.layers.3.mlp.down_proj"]},
    "head by name": {"target_modules": ["lm_head", "o_proj"]},
    "regex": {"target_modules": r"model\.layers\.(1|11)\.mlp\.(up|gate)_proj"},
    "regex anywhere": {"target_modules": r".*_proj"},
    "excluded names": {"target_modules": r".*proj", "exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]},
    "excluded regex": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.1\d\..*"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 10]},
    "layers under a name": {
        "target_modules": ["o_proj"],
        "layers_to_transform": [0, 2],
        "layers_pattern": ["layers"],
    },
}


@pytest.mark.parity
@pytest.mark.parametrize("settings", CHOICES.values(), ids=CHOICES)
def test_choices_are_those_of_peft(settings):
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = peft.LoraConfig(r=8, **settings)
    expected = [name for name in MODULES if check_target_module_exists(theirs, name)]
    found = config(**settings).select(MODULES)
    assert found == expected
    assert 0 < len(found) < len(MODULES)


@pytest.mark.core
def test_all_linear_leaves_the_output_head_alone():
    assert config().select(MODULES) == LAYERS
    assert config(exclude_modules=["mlp.up_proj"]).select(MODULES) == [name for name in LAYERS if "up_proj" not in name]


@pytest.mark.core
def test_names_match_whole_parts_only():
    assert config(target_modules=["proj"]).select(["a.proj", "a.q_proj", "proj.b"]) == ["a.proj"]
    assert config(target_modules=r"proj").select(["proj", "a.proj", "proj.b"]) == ["proj"]


PATTERNS = {
    "q_proj": 2,
    r"layers\.0\.self_attn\.v_proj": 3,
    r"layers\.1\d\.mlp\..*": 4,
    r"layers\.11\.mlp\.up_proj": 5,  # the one before it wins
    "proj": 6,  # no whole part of a name
}


@pytest.mark.parity
def test_ranks_and_alphas_are_those_of_peft():
    pytest.importorskip("peft")
    from peft.utils.other import get_pattern_key

    ours = config(rank_pattern=PATTERNS, alpha_pattern={key: 10.0 * value for key, value in PATTERNS.items()})
    for name in LAYERS:
        key = get_pattern_key(PATTERNS.keys(), name)
        assert ours.rank(name) == PATTERNS.get(key, 8)
        assert ours.alpha(name) == 10 * PATTERNS[key] if key in PATTERNS else 16
    assert {ours.rank(name) for name in LAYERS} == {2, 3, 4, 8}
    assert ours.rank("model.layers.11.mlp.up_proj") == 4


REFUSED = {
    "no such name": ({"target_modules": ["qq_proj"]}, r"target_modules ['qq_proj'] matches no linear layer"),
    "no such regex": ({"target_modules": "q_proj"}, "target_modules 'q_proj' matches no linear layer"),
    "one of several": ({"target_modules": ["q_proj", "c_attn"]}, "target_modules: 'c_attn' matches no linear"),
    "all excluded": ({"target_modules": ["q_proj"], "exclude_modules": r".*"}, "matches no linear layer"),
    "no such layer": ({"target_modules": ["q_proj"], "layers_to_transform": [12]}, "matches no linear layer"),
}


@pytest.mark.core
@pytest.mark.parametrize("settings, message", REFUSED.values(), ids=REFUSED)
def test_targets_that_match_nothing_are_an_error_that_lists_the_names(settings, message):
    with pytest.raises(ValueError) as error:
        config(**settings).select(MODULES)
    assert message in str(error.value)
    assert str(error.value).endswith(f"there are: {FOLDED}")


@pytest.mark.core
@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["k_proj", "q_porj", "self_attn", r"layers\.12\..*"])
def test_a_pattern_that_matches_no_target_is_an_error(option, pattern):
    settings = config(target_modules=["q_proj", "up_proj"], **{option: {"q_proj": 4, pattern: 2}})
    with pytest.raises(ValueError) as error:
        settings.select(MODULES)
    there = "model.layers.*.self_attn.q_proj, model.layers.*.mlp.up_proj"
    assert str(error.value) == f"{option}: {pattern!r} matches none of the targets: {there}"


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "*_proj"},
        {"exclude_modules": "(q_proj"},
        {"rank_pattern": {"*_proj": 2}},
        {"alpha_pattern": {"q_proj[": 2}},
    ],
)
def test_what_is_no_regular_expression_is_named(settings):
    ((option, value),) = settings.items()
    (pattern,) = [value] if isinstance(value, str) else value
    with pytest.raises(ValueError) as error:
        config(**settings).select(MODULES)
    assert str(error.value).startswith(f"{option}: {pattern!r} is not a regular expression: ")
