"""Decides whether a run may begin in its output directory. Reads what an earlier attempt left and changes nothing."""

import os
from pathlib import Path

from jaxft.config import Config
from jaxft.training.logging import read_metrics


class RunDirectoryError(ValueError):
    """The output directory cannot be used as asked; nothing in it was changed."""


def is_begun(config: Config) -> bool:
    """Whether the run may use an output directory that already holds a run."""
    return config.resume_from_checkpoint or nothing_to_lose(Path(config.output_dir))


def nothing_to_lose(output_dir: Path) -> bool:
    """Whether the earlier run failed before it logged an update: then a new run may start there, with any config."""
    metrics = output_dir / "metrics.jsonl"
    results = (output_dir / "adapter", output_dir / "model")
    return (
        (output_dir / "run.json").exists()
        and not any(result.exists() for result in results)
        and not any((output_dir / "checkpoints").glob("[0-9]*"))
        and not (metrics.exists() and any(record.get("step") for record in read_metrics(metrics)))
    )


def check_length(output_dir: str, total_steps: int) -> None:
    """Refuse a run whose last step comes before the step that it has already reached.

    Raises:
        ValueError: says how many updates are done.
    """
    done = max(
        (int(path.name) for path in Path(output_dir, "checkpoints").glob("[0-9]*") if path.name.isdigit()), default=0
    )
    if done > total_steps:
        raise ValueError(
            f"output_dir {output_dir}: {done} updates are done there, and the run is to have {total_steps} now; "
            f"set max_steps to {done} or more, or num_train_epochs to as much"
        )


def refuse_place(path: Path) -> None:
    """Whatever of it exists must be directories, the innermost of them writable."""
    for part in (path, *path.parents):
        if part.is_symlink() and not part.exists():
            raise RunDirectoryError(
                f"output_dir {path}: {part} is a link to {os.readlink(part)}, which does not exist; "
                "make that directory, or choose another output_dir"
            )
        if part.exists():
            break
    if part == path and not path.is_dir():
        raise RunDirectoryError(f"output_dir {path} is a file, not a directory; choose another output_dir")
    if not part.is_dir():
        raise RunDirectoryError(f"output_dir {path} cannot be written: {part} is a file; choose another output_dir")
    if not os.access(part, os.W_OK | os.X_OK):
        raise RunDirectoryError(
            f"output_dir {path} cannot be written: no permission to write in {part}; choose another output_dir"
        )
