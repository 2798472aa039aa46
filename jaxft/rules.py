"""Path rules: the one way to select parameters.

A rule is a pair (pattern, value). The pattern is a regular expression that is searched in a dotted name such as
`model.layers.self_attn.q_proj.weight`. The first rule that matches a name gives its value.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def assign(rules: Sequence[tuple[str, T]], names: Iterable[str], *, may_be_idle: bool = False) -> dict[str, T]:
    """Give every name the value of the first rule that matches it.

    Args:
        rules: (pattern, value), most specific first.
        names: dotted parameter names.
        may_be_idle: allow rules that match nothing, for built-in tables that serve many models.

    Raises:
        ValueError: a name that no rule covers, or a rule that matches no name.

    >>> assign([("q_proj", 1), (".*", 2)], ["a.q_proj", "a.norm"])
    {'a.q_proj': 1, 'a.norm': 2}
    """
    names = list(names)
    result, used = {}, set()
    for name in names:
        for pattern, value in rules:
            if re.search(pattern, name):
                result[name] = value
                used.add(pattern)
                break
        else:
            raise ValueError(f"no rule covers {name!r}; rules: {', '.join(pattern for pattern, _ in rules)}")
    idle = [pattern for pattern, _ in rules if pattern not in used]
    if idle and not may_be_idle:
        raise ValueError(f"rules that decide nothing: {', '.join(idle)}; names: {', '.join(names)}")
    return result
