"""Decides whether a run may begin in its output directory. Reads what an earlier attempt left and changes nothing."""

from pathlib import Path

from jaxft.config import Config
from jaxft.training.logging import read_metrics


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
