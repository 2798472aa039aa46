"""`scripts/train.py` and `jaxft.train`: a config in, a run's directory out.

The order is that of a careful person: read the config, find the model, tokenize all data, place the adapters
on paper, take the directory; only then read weights, ask the base a few held-out prompts, train, export, ask
again, and write the report. What is wrong with the input is found before anything is written.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxft.adapters.attach import detach
from jaxft.cli.command import end_of_turn, exit_code, local
from jaxft.config import Config
from jaxft.config_file import load_config
from jaxft.evaluation.answers import Question, answers, exact_matches, questions
from jaxft.evaluation.report import ExactMatch, ReportData, Sample, write_report
from jaxft.hub.digests import digests
from jaxft.hub.load import eos_token_ids
from jaxft.models.count import ParameterCount, count_parameters
from jaxft.models.decoder import Decoder
from jaxft.platform import devices_needed, prepared
from jaxft.sharding import hosts
from jaxft.sharding.mesh import batch_ways
from jaxft.training.account import NonFiniteLossError
from jaxft.training.begun import check_length, is_begun
from jaxft.training.checkpoint import Checkpoints
from jaxft.training.describe import describe_batch, describe_length, describe_parameters, resolved
from jaxft.training.export import base_record, describe_stops, export, learned_stops, refusals
from jaxft.training.inputs import Inputs, gather
from jaxft.training.logging import MetricsLog, Progress, check_trackers, open_sinks, read_metrics
from jaxft.training.loop import PREEMPTED, Outcome, Preempted, fit, start
from jaxft.training.run_directory import RunDirectory, check_same, check_vacant, open_run
from jaxft.training.same_run import versions
from jaxft.training.stopping import leaving

_RESUMABLE = " before the first update or after the last; resume with resume_from_checkpoint=true"


@dataclass(frozen=True)
class TrainResult:
    """Where a run left its files, and its last numbers."""

    output_dir: Path
    adapter_dir: Path
    steps: int
    metrics: dict[str, Any]


def train(config: str | Path | Mapping[str, Any], **overrides: Any) -> TrainResult:
    """Run a config to its end.

    Args:
        config: a YAML file or a mapping.
        overrides: keys that replace those of the config, as on the command line; values may be paths.

    Raises:
        ValueError: config, model or data has a fault; raised before training begins.
        Preempted: SIGTERM or SIGINT; a checkpoint was saved.
        NonFiniteLossError: the loss became NaN or infinite and stayed so.
    """
    as_json = partial(json.dumps, ensure_ascii=False, default=os.fspath)
    words = [f"{key}={as_json(value)}" for key, value in overrides.items()]
    with prepared(), hosts.together(Preempted, NonFiniteLossError):
        with devices_needed():
            jax.devices()
        return run(load_config(config, words), _plain_console())


def run(config: Config, console: Console, idle: AbstractContextManager[None] | None = None) -> TrainResult:
    """`train` for a checked config; what happens is told on `console`.

    Args:
        idle: entered when the first update is near; it is on top before that update and after the last.
    """
    say = console.print
    hosts.agree({**versions(), **config.model_dump(mode="json")})
    inputs, again = _prepare(config)
    hosts.agree(inputs.fingerprints)
    say(str(inputs.data.report))
    described = inputs.describe()
    counts = count_parameters(described, inputs.recipe.trained_type)
    say(describe_parameters(counts))
    say(describe_batch(inputs))
    for line in refusals(described, inputs):
        say(line)
    with ExitStack() as ending:
        directory = ending.enter_context(open_run(config.output_dir, again, resolved(config), inputs.fingerprints))
        model = inputs.load()
        asked = _ask(inputs)
        before = _answer(detach(model), inputs, asked)
        with Checkpoints(directory.checkpoints, keep=config.save_total_limit) as checkpoints:
            begin = start(inputs, model, checkpoints, directory.resumed)
            del model  # its trained arrays now belong to the run
            if directory.resumed:
                directory.truncate_metrics(begin.step)
                say(f"resumed at step {begin.step}")
                if (before_it := directory.record.get("updates", inputs.total_steps)) != inputs.total_steps:
                    say(describe_length(inputs, begin, before_it))
            directory.write_run({"updates": inputs.total_steps})
            with (
                _metrics_log(directory, config) as log,
                Progress(inputs.total_steps, begin.step, console) as progress,
            ):
                ending.enter_context(idle or nullcontext())
                outcome = fit(inputs, begin, checkpoints, log, progress)
        stops = learned_stops(inputs, end_of_turn(inputs.renderer))
        exported = export(outcome.model, inputs, directory, stops)
        say(f"wrote {exported} (step {outcome.exported_step})")
        say(describe_stops(stops))
        for line in refusals(outcome.model, inputs):
            say(line)
        final = _final_metrics(outcome) | {"exact_match": None}
        directory.finish(
            {
                "final": final,
                "data": asdict(inputs.data.report),
                "parameters": [count._asdict() for count in counts],
                "chat_template": inputs.chat_template,
                "stop_tokens": stops,
                "base": base_record(inputs),
                "result_sha256": digests(exported) if hosts.is_writer() else {},
            }
        )

        after = _answer(outcome.model, inputs, asked)
        match = _compare(asked, before, after, config)
        final["exact_match"] = None if match is None else match._asdict()
        samples = [
            Sample(question.text, question.reference, base, tuned)
            for question, base, tuned in zip(asked, before, after, strict=True)
        ][: config.sample_prompts]
        if hosts.is_writer():
            write_report(
                directory.report_file,
                title=f"{Path(config.model_name_or_path).name}: {directory.path.name}",
                run=_report_data(inputs, counts, outcome, match, directory.record["versions"]),
                records=read_metrics(directory.metrics_file),
                samples=samples,
            )
        directory.finish({"final": final})
        if match is not None:
            say(
                f"exact match on {match.examples} held-out examples: "
                f"{match.base / match.examples:.1%} before, {match.tuned / match.examples:.1%} after"
            )
        say(f"report: {directory.report_file}")
        return TrainResult(directory.path, exported, outcome.step, final)


def dry_run(config: Config, console: Console) -> None:
    """Print what a run would do: config, data, parameters, one example, effective batch. Writes nothing.

    Raises the errors that would refuse the run.
    """
    inputs, again = _prepare(config)
    if again:
        check_same(config.output_dir, again, resolved(config), inputs.fingerprints)
    console.print(resolved(config))
    console.print(str(inputs.data.report))
    described = inputs.describe()
    console.print(describe_parameters(count_parameters(described, inputs.recipe.trained_type)))
    console.print("\nthe first example, with what is learned between ⟦ and ⟧:\n")
    console.print(inputs.renderer.show(inputs.data.train[0][0]))
    console.print("\n" + describe_batch(inputs))
    for line in refusals(described, inputs):
        console.print(line)
    if asked := _ask(inputs):
        console.print(
            f"before and after, the model answers {len(asked)} held-out prompts with up to {config.max_new_tokens} "
            "tokens each (sample_prompts, exact_match_samples)"
        )


def _prepare(config: Config) -> tuple[Inputs, bool]:
    """What a run is made of, and whether it was begun before. What is quickly known to refuse it is asked first."""
    again = hosts.is_writer() and is_begun(config)
    if hosts.is_writer():
        check_vacant(config.output_dir, again)
        check_trackers(config.report_to)
    inputs = gather(config)
    if again:
        check_length(config.output_dir, inputs.total_steps)
    return inputs, again


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 failed run, 2 bad input, 75 told to stop in training, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(description="Fine-tune a Hugging Face model.")
    parser.add_argument(
        "--config", required=True, type=local, help="YAML file; its keys are described in docs/config.md"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the config")
    parsed = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    return exit_code(partial(_obey, parsed))


def _obey(parsed: argparse.Namespace) -> int:
    """The exit code, of what befalls all processes together."""
    config = load_config(parsed.config, parsed.overrides)
    try:
        if parsed.dry_run:
            dry_run(config, _plain_console())
        else:
            run(config, _plain_console(), leaving(_RESUMABLE, PREEMPTED))
    except Preempted as stopped:
        if hosts.is_writer():
            print(stopped, file=sys.stderr)
        return PREEMPTED
    except NonFiniteLossError as error:
        if hosts.is_writer():
            print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _plain_console() -> Console:
    """Prints text as it is, in lines of any length; in one process of a run only."""
    return Console(markup=False, emoji=False, highlight=False, soft_wrap=True, quiet=not hosts.is_writer())


def _metrics_log(directory: RunDirectory, config: Config) -> MetricsLog:
    if not hosts.is_writer():
        return MetricsLog(None)
    sinks = open_sinks(config.report_to, directory.path, directory.path.name, config.model_dump())
    return MetricsLog(directory.metrics_file, sinks)


def _ask(inputs: Inputs) -> list[Question]:
    """What base and tuned model are asked."""
    count = max(inputs.config.exact_match_samples, inputs.config.sample_prompts)
    return questions(inputs.data.eval_examples, inputs.renderer, count, inputs.decoder.rope.max_positions)


def _answer(model: Decoder, inputs: Inputs, asked: Sequence[Question]) -> list[str]:
    renderer = inputs.renderer
    stops = {*eos_token_ids(inputs.resolved.path, renderer.tokenizer.eos_token_id), *end_of_turn(renderer)}
    return answers(model, renderer, asked, sorted(stops), inputs.config.max_new_tokens)


def _compare(
    asked: Sequence[Question], before: Sequence[str], after: Sequence[str], config: Config
) -> ExactMatch | None:
    count = min(config.exact_match_samples, len(asked))
    if count == 0:
        return None
    return ExactMatch(*(exact_matches(found[:count], asked[:count]) for found in (before, after)), count)


def _final_metrics(outcome: Outcome) -> dict[str, Any]:
    books = outcome.bookkeeping
    return {
        "steps": outcome.step,
        "exported_step": outcome.exported_step,
        "eval_loss": books.last_eval_loss,
        "best_eval_loss": books.best_eval_loss,
        "best_step": books.best_step,
        "stopped_early": books.stopped_early,
        "tokens": books.tokens + books.window.tokens,
        "skipped_updates": outcome.skipped,
        "seconds": round(outcome.seconds, 1),
        "state_sha256": outcome.state_sha256,
    }


def _report_data(
    inputs: Inputs,
    counts: Sequence[ParameterCount],
    outcome: Outcome,
    match: ExactMatch | None,
    versions: Mapping[str, str],
) -> ReportData:
    c, devices = inputs.config, inputs.mesh.devices.flatten()
    if c.adapter_name_or_path is not None:
        method = f"going on from {Path(c.adapter_name_or_path).name}"
    else:
        method = "full fine-tuning" if c.adapter == "none" else f"{c.adapter} r={c.lora_r} alpha={c.lora_alpha:g}"
    base = f"{c.quant_type or c.dtype} base" if c.adapter != "none" else f"{c.dtype} compute"
    revision = f" @ {c.model_revision}" if c.model_revision else ""
    return ReportData(
        model=f"{c.model_name_or_path}{revision}",
        method=f"{method}, {base}",
        data=inputs.data.report,
        parameters=counts,
        seen=inputs.schedule.examples(outcome.step),
        epochs=inputs.schedule.epoch(outcome.step),
        exported_step=outcome.exported_step,
        batch=(c.micro_batch_size, c.gradient_accumulation_steps, batch_ways(inputs.mesh)),
        device=f"{len(devices)} × {devices[0].device_kind}",
        seconds=outcome.seconds,
        finished=datetime.now().astimezone(),
        versions=versions,
        exact_match=match,
    )
