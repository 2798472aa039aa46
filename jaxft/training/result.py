"""Opens the result of a finished run, checks that it is unchanged, and finds its base model."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.config import Config
from jaxft.config_file import load_config
from jaxft.hub.digests import digests
from jaxft.hub.load import config_fingerprint, fingerprint
from jaxft.hub.model_files import open_files, read_json
from jaxft.hub.resolve import HubError, ResolvedModel, resolve_model
from jaxft.models.config import Source
from jaxft.training.manifest import is_sealed

_NEEDED = {
    *("fingerprints", "versions", "data", "chat_template", "stop_tokens", "base"),
    *("result_sha256", "config_sha256", "sha256"),
}
"""Keys of `run.json` that an export needs."""


@dataclass(frozen=True)
class Run:
    """A finished run: its directory, its config, what `run.json` holds, and the directory of its result."""

    path: Path
    config: Config
    record: dict[str, Any]
    result: Path

    @property
    def full(self) -> bool:
        """Whether every weight was trained, so that the result is a model and not an adapter."""
        return self.config.adapter == "none"


def open_result(directory: Path) -> Run:
    """A run whose result is complete and undamaged.

    Raises:
        ValueError: there is no run, it has not finished, or its files have changed.
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
    _check_record(directory, record)
    found = digests(result)
    for name, recorded in record["result_sha256"].items():
        if found.get(name) != recorded:
            fault = "does not match the SHA-256 in run.json: damaged" if name in found else "is missing"
            raise ValueError(
                f"{result / name} {fault}; put back a copy, or move {result.name}/ away and run the training "
                "again with resume_from_checkpoint=true, which writes it from the last checkpoint"
            )
    return Run(directory, config, record, result)


def find_base(run: Run, given: str | None = None) -> Source:
    """Find on disk, at the same commit, the base model that the adapter was trained on.

    Args:
        given: where the base is now, if it was moved.

    Raises:
        ValueError: the base is not there, or its weights or config differ.
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


def _check_record(directory: Path, record: dict[str, Any]) -> None:
    """Refuse a `run.json` or `config.yaml` that has changed since the run finished."""
    if lacking := _NEEDED - record.keys():
        raise ValueError(
            f"{directory / 'run.json'} lacks {', '.join(sorted(lacking))}: damaged, or of another version of jaxft"
        )
    config = hashlib.sha256((directory / "config.yaml").read_bytes()).hexdigest()
    for name, intact in (("run.json", is_sealed(record)), ("config.yaml", config == record["config_sha256"])):
        if not intact:
            raise ValueError(
                f"{directory / name} is not as the run wrote it (its SHA-256 differs): damaged, or edited; put it back "
                "as it was"
            )
