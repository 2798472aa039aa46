"""Which linear layers get an adapter, and of which size: PEFT's rules, on Hugging Face module names."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

OUTPUT_HEAD = "lm_head"


@dataclass(frozen=True)
class LoraConfig:
    """The LoRA settings of `adapter_config.json`, in PEFT's terms.

    Attributes:
        r, lora_alpha: rank and alpha, unless a pattern says otherwise.
        target_modules: names or suffixes of module names; or one regular expression for the whole name; or
            "all-linear": every linear layer but the output head.
        target_parameters: names or suffixes of the parameters that hold the experts of a layer in one tensor.
        rank_pattern, alpha_pattern: regular expression for the end of a module name -> rank, alpha.
    """

    r: int
    lora_alpha: float
    target_modules: Sequence[str] | str = "all-linear"
    target_parameters: Sequence[str] = ()
    exclude_modules: Sequence[str] | str | None = None
    layers_to_transform: Sequence[int] | None = None
    layers_pattern: Sequence[str] | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def select(self, modules: Iterable[str], parameters: Iterable[str] = ()) -> list[str]:
        """The modules and the parameters (in models that have such experts) that get an adapter.

        Raises:
            ValueError: nothing matches, or a pattern or a listed name matches nothing; the message lists the names.
        """
        modules, parameters = list(modules), list(parameters)
        self._check_patterns()
        chosen = [name for name in modules if self.chooses(name)]
        if not chosen and not self.target_parameters:
            raise ValueError(
                f"target_modules {self.target_modules!r} matches no linear layer; there are: {summary(modules)}"
            )
        listed = [] if isinstance(self.target_modules, str) else self.target_modules
        for option, targets, names in (
            ("target_modules", listed, modules),
            ("target_parameters", self.target_parameters, parameters),
        ):
            for target in targets:
                if not any(_matches([target], name) for name in names):
                    what = "linear layer" if names is modules else "experts of one tensor"
                    raise ValueError(f"{option}: {target!r} matches no {what}; there are: {summary(names) or 'none'}")
        chosen += [name for name in parameters if _matches(self.target_parameters, name)]
        for option in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, option):
                if not any(ends_with(pattern, name) for name in chosen):
                    raise ValueError(f"{option}: {pattern!r} matches none of the targets: {summary(chosen)}")
        return chosen

    def chooses(self, module: str) -> bool:
        """Whether the options that target and exclude modules choose a linear layer of that name."""
        return self._targets(module) and not _matches(self.exclude_modules, module)

    def _check_patterns(self) -> None:
        for option in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            given = getattr(self, option)
            patterns = [given] if isinstance(given, str) else given if isinstance(given, Mapping) else []
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"{option}: {pattern!r} is not a regular expression: {error}") from None

    def rank(self, module: str) -> int:
        return _lookup(self.rank_pattern, module, self.r)

    def alpha(self, module: str) -> float:
        return _lookup(self.alpha_pattern, module, self.lora_alpha)

    def _targets(self, name: str) -> bool:
        if self.target_modules == "all-linear":
            return name != OUTPUT_HEAD
        if not _matches(self.target_modules, name):
            return False
        if self.layers_to_transform is None or name in self.target_modules:
            return True
        containers = "|".join(self.layers_pattern or [r"[^.]+"])
        layer = re.match(rf".*\.(?:{containers})\.(\d+)\.", name)
        return layer is not None and int(layer[1]) in self.layers_to_transform


def _matches(targets: Sequence[str] | str | None, name: str) -> bool:
    if targets is None:
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def ends_with(pattern: str, name: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` applies to the module of that name."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _lookup(patterns: Mapping[str, float], module: str, default: float) -> float:
    return next((value for pattern, value in patterns.items() if ends_with(pattern, module)), default)


def summary(modules: Iterable[str]) -> str:
    """Module names with numbers of layers and experts folded: `model.layers.*.mlp.up_proj`."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in modules))
