"""Finds the directory on this machine, and the commit, for a user's name of a model.

A name is, in this order:

1. an existing directory, or a GGUF file: that one, even where the Hub has a repository of the same name;
2. `ORG/NAME`: a repository of the Hugging Face Hub, taken from its cache or downloaded;
3. anything else (`./x`, `~/x`, `/x`, `a/b/c`, `x`): a directory that does not exist, which is an error. What
   was meant as a path is never looked up on the Hub.

Weights come as safetensors only. Pickles and Python files are not even downloaded, so nothing can run them.
"""

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from jaxft.redact import redact

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
_NEVER = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.pkl",
    "*.pickle",
    "*.py",
    "consolidated*",
    "original/*",
    "onnx/*",
)


class HubError(ValueError):
    """A model name that leads to no directory."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """The path of a model and its commit hash; None for a local directory or file, which has no version."""

    path: Path
    revision: str | None = None


def resolve_model(
    name_or_path: str, revision: str | None = None, *, files: Sequence[str] = MODEL_FILES
) -> ResolvedModel:
    """The directory of a model, or its GGUF file, downloading what is missing from the Hub's cache.

    Args:
        revision: branch, tag or commit of a Hub repository; None is its main branch.
        files: patterns of what to download. Pickles, Python files and copies of the weights in other layouts
            (`consolidated*`, `original/`, `onnx/`) are left out whatever it says.

    Raises:
        HubError: no such directory, repository or revision, a gated one, or the Hub cannot be reached.
    """
    path = Path(os.path.expanduser(name_or_path))
    if name_or_path and (path.is_dir() or (is_gguf(path) and path.is_file())):
        if revision is not None:
            kind = "directory" if path.is_dir() else "file"
            raise HubError(f"{name_or_path} is a local {kind}: a revision ({revision}) applies to the Hub only")
        return ResolvedModel(path)
    _require_repo_id(name_or_path, path)
    if revision is not None and (not re.fullmatch(r"\w[\w./-]*", revision) or ".." in revision):
        raise HubError(f"{name_or_path}: revision {revision!r} is not a branch, tag or commit")
    try:
        snapshot = huggingface_hub.snapshot_download(
            name_or_path, revision=revision, allow_patterns=list(files), ignore_patterns=list(_NEVER)
        )
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        # `from None`: the text of the cause is quoted without its secrets, a traceback would print them
        raise HubError(_explain(error, name_or_path, revision)) from None
    path = Path(snapshot)
    if not path.is_dir():
        raise HubError(f"{name_or_path} on the Hub has none of the files {', '.join(files)}")
    return ResolvedModel(path, revision=path.name)  # snapshots are named by their commit


def is_repo_id(name: str) -> bool:
    """Whether the Hub may have a repository of that name. No path that begins with a dot, a slash or ~ is one."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a model in one file, not of a directory."""
    return path.suffix == ".gguf" and not path.is_dir()


def _require_repo_id(name: str, path: Path) -> None:
    if path.is_file():
        raise HubError(f"{name} is a file; give the directory that holds config.json and the weights")
    if re.match(r"(https?|hf)://", name):
        raise HubError(f"{redact(name)} is a URL; give ORG/NAME")
    if not re.fullmatch(r"[^/\\.~][^/\\]*/[^/\\]+", name):
        raise HubError(
            f"no such directory: {name!r} (looked for {path.absolute()}). "
            "Give a directory that exists, or ORG/NAME for a repository of the Hugging Face Hub"
        )
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise HubError(f"{name!r} is neither an existing directory nor a Hub repository: {error}") from None


def _explain(error: Exception, repo_id: str, revision: str | None) -> str:
    if isinstance(error, GatedRepoError):
        fault = f"is gated: accept its terms at https://huggingface.co/{repo_id}, then run `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        fault = "does not exist on the Hub, or is private and the token (`hf auth login`) does not see it"
    elif isinstance(error, RevisionNotFoundError):
        fault = f"has no revision {revision}"
    elif isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        fault = "is not in the cache in full, and the Hub cannot be reached or is switched off (HF_HUB_OFFLINE)"
    else:
        fault = "could not be downloaded"
    at = f" --revision {shlex.quote(revision)}" if revision else ""
    return f"""{repo_id}: {fault}.
There is no directory {Path(repo_id).absolute()} either. Without the Hub, on a machine that reaches it run
    hf download {repo_id}{at} --local-dir DIR
bring DIR here, and set
    model_name_or_path: DIR
The Hub's client said: {type(error).__name__}: {redact(str(error))}"""
