"""SHA-256 of the files of a directory, written beside them, so that a changed file is not used in silence.

A bit flipped on a disk and an alpha edited by hand change what an adapter does, and nothing else would show it. A
model card is for people and may be edited; it is left out, and so is what a registry or a file manager adds.
"""

import hashlib
import json
from pathlib import Path

from jaxft.hub.model_files import read_json

DIGEST_FILE = "jaxft_files.json"
CARD_FILE = "README.md"


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file in a directory but the model card, by its relative path."""
    result = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        if name != CARD_FILE:
            with open(path, "rb") as file:
                result[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return result


def write_digests(directory: Path) -> None:
    """Record the files of a directory as they are now."""
    found = {name: digest for name, digest in digests(directory).items() if name != DIGEST_FILE}
    (directory / DIGEST_FILE).write_text(json.dumps({"sha256": found}, indent=2) + "\n", encoding="utf-8")


def check_digests(directory: Path) -> None:
    """Compare the files of a directory with what was recorded there; without a record there is nothing to compare.

    Raises:
        ValueError: a file is missing or is not as it was written, or the record is damaged.
    """
    record = directory / DIGEST_FILE
    if not record.exists():
        return
    recorded = read_json(record).get("sha256")
    if not _texts_by_name(recorded):
        raise ValueError(f"{record} is damaged: `sha256` is to be an object of file names and digests; {_advice()}")
    for name, digest in recorded.items():
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{path} is missing, though {DIGEST_FILE} names it; put it back, or {_advice()}")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise ValueError(f"{path} is not as it was written (its SHA-256 differs); put it back, or {_advice()}")


def _texts_by_name(value: object) -> bool:
    """Whether it is an object that gives texts to names, one at least."""
    return isinstance(value, dict) and bool(value) and all(isinstance(one, str) for one in value.values())


def _advice() -> str:
    return f"if it was changed on purpose, delete {DIGEST_FILE}"
