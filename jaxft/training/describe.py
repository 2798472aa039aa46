"""Describes a run before it begins."""

from collections.abc import Sequence
from pathlib import Path

from jaxft.config import Config
from jaxft.hub.peft_config import read_adapter_config
from jaxft.models.count import ParameterCount
from jaxft.sharding.mesh import batch_ways
from jaxft.training.inputs import Inputs
from jaxft.training.loop import Start
from jaxft.training.optimizer import learning_rate_schedule


def resolved(config: Config) -> str:
    """The config as it is written down: with what the adapter says that it goes on from."""
    if config.adapter_name_or_path is None:
        return config.to_yaml()
    spec = read_adapter_config(Path(config.adapter_name_or_path))
    targets = spec.target_modules if isinstance(spec.target_modules, str) else sorted(spec.target_modules)
    return config.to_yaml(
        {
            "adapter": "dora" if spec.use_dora else "lora",
            "use_dora": spec.use_dora,
            "lora_r": spec.r,
            "lora_alpha": spec.lora_alpha,
            "lora_dropout": spec.lora_dropout,
            "lora_target_modules": targets,
            "lora_target_parameters": list(spec.target_parameters),
            "use_rslora": spec.use_rslora,
            "rank_pattern": dict(spec.rank_pattern),
            "alpha_pattern": dict(spec.alpha_pattern),
        }
    )


def describe_parameters(counts: Sequence[ParameterCount]) -> str:
    total, trained = sum(c.count for c in counts), sum(c.count for c in counts if c.trained)
    lines = [f"{total:,} parameters, {trained:,} trained ({trained / total:.3%})"]
    lines += [
        f"  {c.format}: {c.count:,} parameters, {c.bytes / 1e6:,.1f} MB{', trained' if c.trained else ''}"
        for c in counts
    ]
    return "\n".join(lines)


def describe_batch(inputs: Inputs) -> str:
    c, ways = inputs.config, batch_ways(inputs.mesh)
    rows = inputs.rows * c.gradient_accumulation_steps
    length = inputs.schedule.row_length
    mesh = " x ".join(f"{axis} {size}" for axis, size in inputs.mesh.shape.items())
    return (
        f"effective batch: {rows} rows of {length} tokens = {c.micro_batch_size} (micro_batch_size) "
        f"x {c.gradient_accumulation_steps} (accumulation) x {ways} (data x fsdp x expert); mesh: {mesh}\n"
        f"attention: {inputs.recipe.attention(inputs.mesh)}\n"
        f"{inputs.total_steps} updates, {inputs.schedule.epoch(inputs.total_steps):.2f} epochs"
    )


def describe_length(inputs: Inputs, begin: Start, updates_before: int) -> str:
    """How a changed number of updates affects the learning rate."""
    done = begin.step - int(begin.state.skipped)
    before, now = (learning_rate_schedule(inputs.config, updates) for updates in (updates_before, inputs.total_steps))
    next_rate, otherwise = float(now(done)), float(before(done))
    last_rate = float(now(max(inputs.total_steps - 1, done)))
    lines = [
        f"{inputs.total_steps} updates instead of {updates_before}: the learning rate is {next_rate:.3g} at step "
        f"{begin.step + 1} (it would have been {otherwise:.3g}) and {last_rate:.3g} at the last"
    ]
    if begin.books.stopped_early:
        lines.append("the run has stopped early (early_stopping_patience): there are no more updates")
    return "\n".join(lines)
