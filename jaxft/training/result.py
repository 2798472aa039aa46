"""The result of a finished run, proven to be what the run wrote, and the base that it belongs to."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.config import Config
from jaxft.config_file import load_config
from jaxft.data.chat import load_tokenizer
from jaxft.hub.digests import digests, texts_by_name
from jaxft.hub.load import config_fingerprint, eos_token_ids, fingerprint
from jaxft.hub.model_files import open_files, read_json
from jaxft.hub.peft import TENSOR_STEM
from jaxft.hub.peft_config import CONFIG_FILE
from jaxft.hub.resolve import HubError, ResolvedModel, resolve_model
from jaxft.models.config import Source


@dataclass(frozen=True)
class Run:
    """A finished run: its directory, its config, what `run.json` holds, and the directory of its result."""

    path: Path
    config: Config
    record: dict[str, Any]
    result: Path

    @property
    def full(self) -> bool:
        """Every weight was trained; the result is a model, not an adapter."""
        return self.config.adapter == "none"


def open_result(directory: Path) -> Run:
    """A run whose result is complete and undamaged.

    Raises:
        ValueError: no run, one that has not finished, or files that are not as it wrote them.
    """
    for name in ("run.json", "config.yaml"):
        if not (directory / name).is_file():
            raise ValueError(f"{directory}: not the output_dir of a run: it has no {name}")
    config, record = load_config(directory / "config.yaml"), read_json(directory / "run.json")
    result = directory / ("model" if config.adapter == "none" else "adapter")
    if not record.get("finished"):
        missing = "" if result.is_dir() else f", and there is no {result.name}/"
        raise ValueError(
            f"{directory}: the run has not finished{missing}; "
            "go on with it (resume_from_checkpoint=true), then export it"
        )
    _check_record(directory / "run.json", record)
    expected = {CONFIG_FILE, f"{TENSOR_STEM}.safetensors"} if result.name == "adapter" else {"config.json"}
    if lost := expected - record["result_sha256"].keys():
        raise ValueError(f"{directory / 'run.json'} is damaged: result_sha256 lacks {', '.join(sorted(lost))}")
    found = digests(result)
    for name, recorded in record["result_sha256"].items():
        if found.get(name) != recorded:
            fault = "does not match the SHA-256 in run.json: damaged" if name in found else "is missing"
            raise ValueError(
                f"{result / name} {fault}; put back a copy, or move {result.name}/ away and run the training "
                "again with resume_from_checkpoint=true, which writes it from the last checkpoint"
            )
    _check_stops(directory / "run.json", record["stop_tokens"], result)
    return Run(directory, config, record, result)


def find_base(run: Run, given: str | None = None) -> Source:
    """The base that the adapter was trained on, as it is on disk, at the same commit.

    Args:
        given: where it is now, if not where it was.

    Raises:
        ValueError: it is not there, or there are other weights in its place.
    """
    base = run.record["base"]
    resolved = resolve_model(given) if given is not None else _where_it_was(run)
    weights = fingerprint(open_files(resolved.path))
    found = {"base": weights, "base config": config_fingerprint(resolved.path)}
    for part, what in (("base", "weights"), ("base config", "config.json")):
        if found[part] != (recorded := run.record["fingerprints"][part]):
            raise ValueError(
                f"{resolved.path}: not the {what} that {run.path} was trained on (fingerprint {found[part][:12]}, "
                f"recorded {recorded[:12]}); put back what was there, or say with --base where it is now"
            )
    return Source(given or base["name"], str(resolved.path), resolved.revision, weights)


def _where_it_was(run: Run) -> ResolvedModel:
    base = run.record["base"]
    if base["revision"] is None:
        if not Path(base["path"]).exists():
            raise ValueError(
                f"{base['path']}: no such directory or file; {run.path} was trained on it (model_name_or_path: "
                f"{base['name']}). If it was moved, say with --base where it is now"
            )
        return resolve_model(base["path"])
    try:
        return resolve_model(base["name"], base["revision"])
    except HubError as error:
        raise HubError(f"{error}\nOr say with --base where a copy is") from None


def _check_stops(path: Path, stops: dict[str, int], result: Path) -> None:
    """Refuse stop tokens that are not those of the result, whose files are as they were written."""
    ids = load_tokenizer(result).convert_tokens_to_ids(list(stops))
    if ids != list(stops.values()) or sorted(ids) != eos_token_ids(result, None):
        raise ValueError(f"{path} is damaged: stop_tokens are not those of {result.name}/; put it back as it was")


def _check_record(path: Path, record: dict[str, Any]) -> None:
    """Refuse a `run.json` that lacks what an export needs, or holds something else in its place."""
    needed = {"fingerprints", "result_sha256", "chat_template", "base", "stop_tokens", "versions", "data"}
    if lacking := needed - record.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(lacking))}: damaged, or of another version")
    prints, base, template = record["fingerprints"], record["base"], record["chat_template"]
    sound = {
        "fingerprints": texts_by_name(prints) and {"base", "base config", "chat template"} <= prints.keys(),
        "result_sha256": texts_by_name(record["result_sha256"]),
        "versions": texts_by_name(record["versions"]),
        "data": isinstance(record["data"], dict) and type(record["data"].get("held_out")) is int,
        "chat_template": template is None or isinstance(template, str),
        "base": isinstance(base, dict)
        and all(isinstance(base.get(key), str) for key in ("name", "path"))
        and isinstance(base.get("revision"), str | None),
        "stop_tokens": isinstance(record["stop_tokens"], dict)
        and all(type(index) is int for index in record["stop_tokens"].values()),
    }
    if damaged := [key for key, good in sound.items() if not good]:
        raise ValueError(f"{path} is damaged: {', '.join(damaged)} holds what no run writes")
    if hashlib.sha256((template or "").encode()).hexdigest() != prints["chat template"]:
        raise ValueError(
            f"{path}: the chat_template is not the one that was trained with (its SHA-256 is not that of fingerprints: "
            "chat template); put it back as it was"
        )
