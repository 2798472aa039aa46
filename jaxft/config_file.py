"""From a YAML file and `key=value` words to a checked `Config`.

Read, merge, check. The file is YAML with the scalars of YAML 1.2 (`1e-4` is a number, `no` is a string), no
tags and no duplicate keys. Names that other trainers use become ours (`ALIASES`, `TRANSLATIONS`); two
spellings of one key may agree but not differ. The command line then replaces what the file says about the
same thing, however each of them spells it. What the schema then finds is put into words by `config_errors`.
"""

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from jaxft.config import SECRET_LIKE, Config, ConfigError, YamlDumper
from jaxft.config_errors import COMMAND_LINE, KeyPath, dotted, explain, got, show

#: Other trainers' names for our keys.
ALIASES: dict[str, str] = {
    "base_model": "model_name_or_path",
    "model": "model_name_or_path",
    "revision": "model_revision",
    "torch_dtype": "dtype",
    "bnb_4bit_quant_type": "quant_type",
    "bnb_4bit_use_double_quant": "use_double_quant",
    "peft_use_dora": "use_dora",
    "lora_rank": "lora_r",
    "r": "lora_r",
    "lora_target": "lora_target_modules",
    "target_modules": "lora_target_modules",
    "peft_use_rslora": "use_rslora",
    "lora_model_dir": "adapter_name_or_path",
    "val_size": "val_set_size",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "max_seq_length": "max_length",
    "sample_packing": "packing",
    "per_device_train_batch_size": "micro_batch_size",
    "batch_size": "micro_batch_size",
    "clip_grad_norm": "max_grad_norm",
    "lr_scheduler": "lr_scheduler_type",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
}
#: Other trainers' keys whose values differ from ours too: value there -> (our key, our value).
TRANSLATIONS: dict[str, dict[str | int | bool, tuple[str, str | bool]]] = {
    "quantization_bit": {4: ("load_in_4bit", True), 8: ("load_in_8bit", True)},
    "finetuning_type": {
        "lora": ("adapter", "lora"),
        "full": ("adapter", "none"),
        "none": ("adapter", "none"),
    },
    "use_peft": {True: ("adapter", "lora"), False: ("adapter", "none")},
    "train_on_inputs": {True: ("assistant_only_loss", False), False: ("assistant_only_loss", True)},
    "gradient_checkpointing": {True: ("remat", "full"), False: ("remat", "none")},
    "activation_offloading": {True: ("offload", ["activations"]), False: ("offload", [])},
}
# Keys that say one thing in several ways: an override of one takes back what the file says by the others.
_SPELLINGS = [{"adapter", "use_dora"}, {"load_in_4bit", "load_in_8bit", "quant_type"}]
# Keys that exclude each other: the same, unless the override only switches its own key off (null, 0, []).
_RIVALS = [
    {"warmup_ratio", "warmup_steps"},
    {"num_train_epochs", "max_steps"},
    {"val_set_size", "eval_datasets"},
]


class _Given(NamedTuple):
    written: str  # the key as the user spelt it
    value: Any


def load_config(source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Check a YAML file, or a mapping (where a text may be a `Path`), after the overrides of a command line.

    An override is `key=value`. The key may be an alias, or dotted (`mesh.fsdp=8`, `datasets.0.weight=2`); the
    value is YAML (`learning_rate=1e-4`, `lora_target_modules=[q_proj, v_proj]`; nothing at all is null).

    Raises ConfigError, with a line for every problem found.
    """
    if isinstance(source, Mapping):
        where, pairs = "config", _without_paths(source).items()
    else:
        where, pairs = os.fspath(source), _read(Path(source).expanduser()).items()
    from_file = _canonical(where, (((key,), _Given(str(key), value)) for key, value in pairs))
    from_line = _canonical(COMMAND_LINE, map(_parse_override, overrides))

    replaced = {key for path, given in from_line.items() for key in _replaced_by(path[0], given.value)}
    tree = {path[0]: copy.deepcopy(given.value) for path, given in from_file.items() if path[0] not in replaced}
    for path, given in sorted(from_line.items(), key=lambda item: len(item[0])):  # wholes before their parts
        _assign(tree, path, given)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        names = {path[0]: given.written for path, given in (from_file | from_line).items()}
        spelt = {key: name for key, name in names.items() if name in ALIASES or name in TRANSLATIONS}
        lines = explain(error, tree, where, spelt, list(from_line), [*ALIASES, *TRANSLATIONS])
        raise ConfigError("\n".join(lines)) from None


# Reading


class _Loader(yaml.SafeLoader):
    """Reads what YamlDumper writes; refuses tags and duplicate keys."""

    yaml_implicit_resolvers = YamlDumper.yaml_implicit_resolvers

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem="a tag has no place in a config; put a text that starts with ! in quotes",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (name := (key.tag, key.value)) in lines:
                problem = f"key `{key.value}` is given twice, first on line {lines[name]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[name] = key.start_mark.line + 1
        return node


_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))  # 010 is ten


def _read(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        line, problem = _diagnose(error, text)
        raise ConfigError(f"{path}:{line}: {problem}") from None
    if not isinstance(data, dict):
        problem = "is empty" if data is None else f"is not a mapping{got(data)}"
        raise ConfigError(f"{path}: {problem}; a config has a line for every key, as in `lora_r: 16`")
    return data


def _diagnose(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    """Line and problem, without the excerpt of the file that PyYAML would print."""
    if isinstance(error, yaml.MarkedYAMLError):
        line, problem = error.problem_mark.line + 1, ", ".join(filter(None, (error.context, error.problem)))
    else:
        line, problem = text.count("\n", 0, error.position) + 1, error.reason
    return line, "is not valid YAML" if SECRET_LIKE.search(problem) else problem


def _without_paths(value: Any) -> Any:
    """The same with texts for paths, at any depth."""
    if isinstance(value, Mapping):
        return {key: _without_paths(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(part) for part in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


# Merging


def _canonical(where: str, pairs: Iterable[tuple[KeyPath, _Given]]) -> dict[KeyPath, _Given]:
    """The same settings under our own keys. Raises ConfigError where two spellings of one key differ."""
    found: dict[KeyPath, _Given] = {}
    problems = []
    for path, (written, value) in pairs:
        if path[0] in TRANSLATIONS:
            choices = TRANSLATIONS[path[0]]
            meant = [ours for theirs, ours in choices.items() if theirs == value and type(theirs) is type(value)]
            if not meant:
                problems.append(f"{where}: {written}: must be {' or '.join(map(show, choices))}{got(value)}")
                continue
            path, value = meant[0][:1], meant[0][1]
        else:
            path = (ALIASES.get(path[0], path[0]), *path[1:])
        if path not in found:
            found[path] = _Given(written, value)
        elif found[path].value != value:
            spellings = " and ".join(dict.fromkeys((found[path].written, written)))
            problems.append(f"{where}: {dotted(path)}: has two values, given as {spellings}; keep one")
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def _parse_override(text: str) -> tuple[KeyPath, _Given]:
    written, sign, value = text.partition("=")
    written = written.strip()
    if not (sign and written):
        raise ConfigError(f"{COMMAND_LINE}: expected key=value, as in learning_rate=1e-4{got(text)}")
    try:
        return _parse_key(written), _Given(written, yaml.load(value, Loader=_Loader))
    except yaml.YAMLError as error:
        _, problem = _diagnose(error, value)
        raise ConfigError(f"{COMMAND_LINE}: {written}: {problem}; quotes make it plain text") from None


def _parse_key(written: str) -> KeyPath:
    """Split a dotted key as the schema nests: keys of a free mapping, like rank_pattern, may hold dots."""
    head, *rest = written.split(".")
    path: KeyPath = (head,)
    kind = _kind(Config, ALIASES.get(head, head))
    while rest:
        if kind is None and head not in TRANSLATIONS:
            return path  # unknown, which the schema will say
        if get_origin(kind) is dict:
            return (*path, ".".join(rest))
        part: str | int = rest.pop(0)
        if get_origin(kind) is list and part.isdecimal():
            part, (kind,) = int(part), get_args(kind)
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = _kind(kind, part)
        else:
            raise ConfigError(f"{COMMAND_LINE}: {written}: {dotted(path)} has no part `{part}`")
        path = (*path, part)
    return path


def _kind(section: type[BaseModel], key: str) -> Any:
    return section.model_fields[key].annotation if key in section.model_fields else None


def _replaced_by(key: str, value: Any) -> set[str]:
    """Keys of the file that no longer hold once the command line sets `key`."""
    groups = _SPELLINGS + (_RIVALS if value else [])
    return {other for group in groups if key in group for other in group - {key}}


def _assign(tree: dict[str, Any], path: KeyPath, given: _Given) -> None:
    node: Any = tree
    for depth, part in enumerate(path):
        if isinstance(part, int):
            fits = isinstance(node, list) and part < len(node)
        else:
            fits = isinstance(node, dict)
        if not fits:
            problem = f"the config has no {dotted(path[: depth + 1])} to change"
            raise ConfigError(f"{COMMAND_LINE}: {given.written}: {problem}")
        if depth == len(path) - 1:
            node[part] = given.value
            return
        if isinstance(node, dict):
            node.setdefault(part, {})
        elif isinstance(node[part], str):
            node[part] = {"path": node[part]}  # a dataset known by its path alone
        node = node[part]
