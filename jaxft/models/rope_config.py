"""From the `rope_parameters` of a config.json to a `Rope`."""

from collections.abc import Mapping
from typing import Any

from jaxft.models.config import Rope

_ORIGINAL = "original_max_position_embeddings"
_ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # required keys, optional keys
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL), ()),
    "yarn": (
        (_ORIGINAL,),
        ("factor", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"),
    ),
    "longrope": (("long_factor", "short_factor", _ORIGINAL), ("factor", "attention_factor")),
}


def parse_rope(parameters: Mapping[str, Any], head_dim: int, max_positions: int, interleaved: bool) -> Rope:
    """The rotary embedding that `rope_parameters` describe.

    Raises:
        ValueError: a type that is not supported, or a parameter that is missing or invalid.
    """
    given = {key: value for key, value in parameters.items() if value is not None}
    kind = given.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise ValueError(f"config.json: rope_type {kind!r} is not supported; supported: {', '.join(_ROPE_KEYS)}")
    needed, optional = _ROPE_KEYS[kind]
    for key in ("rope_theta", *needed):
        if key not in given:
            raise ValueError(f"config.json: rope_type {kind} needs {key}")
    kept = {key: given[key] for key in needed + optional if key in given}
    dim = int(head_dim * given.get("partial_rotary_factor", 1.0))
    for key, value in {"rope_theta": given["rope_theta"], **kept}.items():
        if key in ("long_factor", "short_factor"):
            if not isinstance(value, list) or len(value) != dim // 2 or not all(map(_is_number, value)):
                raise ValueError(f"config.json: {key} of the rope must be {dim // 2} numbers, not {value!r}")
        elif not _is_number(value) or (key in ("rope_theta", "factor") and value <= 0):
            raise ValueError(f"config.json: {key} of the rope must be a positive number, not {value!r}")
    frozen = tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in kept.items())
    return Rope(float(given["rope_theta"]), dim, max_positions, kind, frozen, interleaved)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
