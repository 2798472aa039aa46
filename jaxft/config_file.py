"""From a YAML file and `key=value` words to a checked `Config`.

Read, merge, check. The file is YAML with the scalars of YAML 1.2 (`1e-4` is a number, `no` is a string), no
tags and no duplicate keys. Names and values that other trainers use become ours (`config_names`); two
spellings of one key may agree but not differ. The command line then replaces what the file says about the
same thing, however each of them spells it. What the schema then finds is put into words by `config_errors`.
What is given and has no effect, but asks for nothing either, is told in a warning.
"""

import copy
import logging
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from jaxft.config import SECRET_LIKE, Config, ConfigError, YamlDumper
from jaxft.config_errors import COMMAND_LINE, KeyPath, dotted, explain, got, show
from jaxft.config_names import ALIASES, ELSEWHERE, NEEDS, TRANSLATIONS, is_off, meaning
from jaxft.config_rules import OF_A_NEW_ADAPTER, idle

logger = logging.getLogger(__name__)

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
    problems: list[str] = []
    from_file = _canonical(where, (((key,), _Given(str(key), value)) for key, value in pairs), problems)
    from_line = _canonical(COMMAND_LINE, map(_parse_override, overrides), problems)

    replaced = {key for path, given in from_line.items() for key in _replaced_by(path[0], given.value)}
    replaced |= _give_way(where, from_file, from_line)
    tree = {path[0]: copy.deepcopy(given.value) for path, given in from_file.items() if path[0] not in replaced}
    for path, given in sorted(from_line.items(), key=lambda item: len(item[0])):  # wholes before their parts
        _assign(tree, path, given)
    names = {path[0]: given.written for path, given in (from_file | from_line).items()}
    spelt = {key: name for key, name in names.items() if name != key and "." not in name}
    config = None
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems += explain(error, tree, where, spelt, list(from_line), [*ALIASES, *TRANSLATIONS])
    if config is None or problems:
        raise ConfigError("\n".join(problems))
    _tell(config, tree, spelt, {path[0] for path in from_line})
    return config


def _tell(config: Config, tree: Mapping[str, Any], spelt: Mapping[str, str], overridden: Set[str]) -> None:
    """Warn of what the user wrote and might take for more than it is; not of what takes a key of the file back."""
    for key, why, _ in idle(config):
        if key == "adapter":
            continue  # `adapter: lora` is true of what goes on from an adapter, too
        taken_back = key in overridden and getattr(config, key) == Config.model_fields[key].default
        if not (is_off(tree.get(key)) or taken_back):
            logger.warning("%s %s", spelt.get(key, key), why.replace("`", ""))
    if len(config.datasets) == 1 and config.datasets[0].weight is not None:
        logger.warning("weight of datasets.0 has no effect: there is no other source")
    if "lora_r" in tree and "lora_alpha" not in tree and config.lora_alpha != 2 * config.lora_r:
        logger.warning(
            "lora_alpha is not given, so it is %g, whatever lora_r is (%d here); other trainers take 2 x lora_r, or 8",
            config.lora_alpha,
            config.lora_r,
        )


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


def _canonical(where: str, pairs: Iterable[tuple[KeyPath, _Given]], problems: list[str]) -> dict[KeyPath, _Given]:
    """The same settings under our own keys.

    Args:
        problems: gets a line for each key that is not understood, and where two spellings of one key differ.
    """
    found: dict[KeyPath, _Given] = {}
    needed: list[tuple[str, Any, str]] = []
    for path, (written, value) in pairs:
        head = path[0]
        if head in ELSEWHERE:
            if not is_off(value):
                problems.append(f"{where}: {written}: has no counterpart here: {ELSEWHERE[head]}")
            continue
        if head in TRANSLATIONS:
            choices = TRANSLATIONS[head]
            meant = [ours for theirs, ours in choices.items() if theirs == value and type(theirs) is type(value)]
            if not meant:
                problems.append(f"{where}: {written}: must be {' or '.join(map(show, choices))}{got(value)}")
                continue
            settings = {(key,): part for key, part in meant[0].items()}
            if key := NEEDS.get((head, value)):
                needed.append((written, value, key))
        elif len(path) == 1:
            settings = {(key,): part for key, part in meaning(ALIASES.get(head, head), value).items()}
        else:
            settings = {(ALIASES.get(head, head), *path[1:]): value}
        for key, part in settings.items():
            if key not in found:
                found[key] = _Given(written, part)
            elif found[key].value != part:
                spellings = " and ".join(dict.fromkeys((found[key].written, written)))
                problems.append(f"{where}: {dotted(key)}: has two values, given as {spellings}; keep one")
    for written, value, key in needed:
        if (key,) not in found:
            problems.append(f"{where}: {written}: {value} needs `{key}`, the number of updates between two; give it")
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


def _give_way(where: str, from_file: Mapping[KeyPath, _Given], from_line: Mapping[KeyPath, _Given]) -> set[str]:
    """Keys of the file for a new adapter, where the command line wants none, or goes on from one; tells which."""
    given = {path[0]: given.value for path, given in from_line.items()}
    causes = [key for key in ("adapter", "adapter_name_or_path") if given.get(key) not in (None, "lora", "dora")]
    if not causes:
        return set()
    gone = {path[0] for path in from_file if path[0] in OF_A_NEW_ADAPTER} - {*given}
    lost = [k for k in OF_A_NEW_ADAPTER if k in gone and from_file[k,].value != Config.model_fields[k].default]
    if lost:
        logger.warning("%s on the %s: %s of %s no longer apply", causes[0], COMMAND_LINE, ", ".join(lost), where)
    return gone


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
