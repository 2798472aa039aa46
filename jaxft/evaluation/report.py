"""One page that tells what a run did: its result, curves, counts, and answers before and after.

The page is a single HTML file. Styles and charts are inside, it runs no script and loads nothing, so it can
be mailed, archived and read offline. `report.html` is its template; all text from outside is escaped.
"""

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from jaxft.data.prepare import Report as DataReport
from jaxft.evaluation.chart import Chart, Points, lowest, make_chart
from jaxft.limits import writing
from jaxft.models.count import ParameterCount


class Sample(NamedTuple):
    """A held-out prompt, its reference answer, and the answers of the base and the tuned model."""

    prompt: str
    reference: str
    base: str
    tuned: str


class ExactMatch(NamedTuple):
    """How many of the held-out `examples` each model answered exactly."""

    base: int
    tuned: int
    examples: int


@dataclass(frozen=True)
class ReportData:
    """What a report tells beyond the metrics of a run."""

    model: str  # name or path, with the revision if one was asked for
    method: str  # as in "LoRA r=16 alpha=32 on 7 kinds of modules, NF4 base"
    data: DataReport
    parameters: Sequence[ParameterCount]
    seen: int  # examples trained on; one that came twice counts twice
    epochs: float  # passes over the training data that were made
    exported_step: int  # whose weights the run leaves
    batch: tuple[int, int, int]  # rows per micro-batch, micro-batches per update, data-parallel groups
    device: str  # as in "8 × TPU v5e"
    seconds: float  # that training took
    finished: datetime
    versions: Mapping[str, str]  # by package
    exact_match: ExactMatch | None = None


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    run: ReportData,
    records: Sequence[Mapping[str, Any]],
    samples: Sequence[Sample] = (),
) -> None:
    """Write the report of a run, whole or not at all.

    Args:
      records: lines of metrics.jsonl in any order. Of two lines with the same metric and step the later one
        holds, as after resuming from a checkpoint. "NaN" and the like may stand as strings.

    Raises:
      OSError: it cannot be written; names the file, and says what is lost and what is not.
    """
    curves = {key: _points(records, key) for key in ("loss", "eval_loss", "tokens", *_SMALL_CHARTS)}
    loss = _loss_chart(curves, _last_step(records))
    charts = [*_measured_charts(records), *_small_charts(curves, _last_step(records))]
    page = _TEMPLATES.get_template("report.html").render(
        title=title,
        run=run,
        headlines=list(_headlines(run, curves)),
        loss=loss,
        charts=charts,
        grouped=max((chart.grouped for chart in (loss, *charts) if chart), default=1),
        facts=list(_facts(run, records, curves)),
        total=ParameterCount(
            "total", sum(p.count for p in run.parameters), sum(p.bytes for p in run.parameters), False
        ),
        samples=samples,
    )
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path, "; what was trained is complete, and resume_from_checkpoint: true writes the report alone"):
            partial.write_text(page, encoding="utf-8", errors="backslashreplace")
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class _Fact(NamedTuple):
    name: str
    value: str
    detail: str = ""


_SMALL_CHARTS = {
    "learning_rate": ("Learning rate", ""),
    "tokens_per_second": ("Throughput", "tokens/s"),
    "grad_norm": ("Gradient norm", ""),
}
_NOT_MEASURED = {
    *("step", "epoch", "loss", "tokens", "skipped_updates", "eval_loss", "eval_perplexity"),
    *_SMALL_CHARTS,
}
"""Keys of records that every run has; any other is something that its objective measures."""


def _points(records: Sequence[Mapping[str, Any]], key: str) -> Points:
    by_step = {record["step"]: float(record[key]) for record in records if key in record}
    return sorted(by_step.items())


def _last_step(records: Sequence[Mapping[str, Any]]) -> int:
    return max((record["step"] for record in records), default=0)


def _loss_chart(curves: Mapping[str, Points], last_step: int) -> Chart | None:
    names = {"training": "loss", "held-out": "eval_loss"}
    series = {name: curves[key] for name, key in names.items() if curves[key]}
    best_of = "held-out" if "held-out" in series else None
    if not series:
        return None
    return make_chart("Loss", series, last_step=last_step, from_zero=False, best_of=best_of)


def _measured_charts(records: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    """One for each number that the objective measures besides its loss."""
    keys = dict.fromkeys(key for record in records for key in record if key not in _NOT_MEASURED)
    for name in dict.fromkeys(key.removeprefix("eval_") for key in keys):
        series = {"training": _points(records, name), "held-out": _points(records, f"eval_{name}")}
        there = {label: points for label, points in series.items() if points}
        yield make_chart(name, there, unit="", last_step=_last_step(records), from_zero=False)


def _small_charts(curves: Mapping[str, Points], last_step: int) -> Iterator[Chart]:
    for key, (name, unit) in _SMALL_CHARTS.items():
        if curves[key]:
            yield make_chart(name, {name: curves[key]}, unit=unit, last_step=last_step)


def _headlines(run: ReportData, curves: Mapping[str, Points]) -> Iterator[_Fact]:
    evaluations = curves["eval_loss"]
    if best := lowest(evaluations):
        detail = f"lowest, at step {best[0]:,}; {evaluations[-1][1]:#.4g} at the end"
        if evaluations[0][0] == 0:
            detail += f", {evaluations[0][1]:#.4g} before training"
        yield _Fact("Held-out loss", f"{best[1]:#.4g}", detail)
    elif evaluations:
        yield _Fact("Held-out loss", "not finite", f"in any of {len(evaluations):,} evaluations")
    elif curves["loss"]:
        step, loss = curves["loss"][-1]
        yield _Fact("Training loss", f"{loss:#.4g}", f"at step {step:,}; nothing was held out")
    if match := run.exact_match:
        base, tuned = (f"{count / match.examples:.1%}" for count in (match.base, match.tuned))
        yield _Fact("Exact match", tuned, f"of {match.examples:,} held-out answers; {base} before training")
    tokens = curves["tokens"][-1][1] if curves["tokens"] else run.data.train_tokens
    passes = f"{run.seen:,} examples: {run.epochs:.2f} epochs of {run.data.train:,}"
    yield _Fact("Trained on", f"{tokens:,.0f}", f"tokens, {passes}")
    yield _Fact("Time", _duration(run.seconds), run.device)


def _facts(run: ReportData, records: Sequence[Mapping[str, Any]], curves: Mapping[str, Points]) -> Iterator[_Fact]:
    skipped = max((record.get("skipped_updates", 0) for record in records), default=0)
    yield _Fact("Updates", f"{_last_step(records):,}", f"{skipped:,} skipped, not finite" if skipped else "")
    yield _Fact("Epochs", f"{run.epochs:.4g}")
    yield _Fact("Exported", f"the weights after update {run.exported_step:,}")
    rows, accumulated, groups = run.batch
    factors = f"{rows} per micro-batch × {accumulated} accumulated × {groups} data-parallel"
    yield _Fact("Rows per update", f"{rows * accumulated * groups:,}", factors)
    if speeds := [speed for _, speed in curves["tokens_per_second"]]:
        yield _Fact("Median throughput", f"{statistics.median(speeds):,.0f} tokens/s")
    yield _Fact("Held out", f"{run.data.held_out:,} examples")
    yield _Fact("Device", run.device)
    yield _Fact("Versions", ", ".join(f"{package} {version}" for package, version in run.versions.items()))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _size(count: int) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            return f"{count / 2**power:.2f} {unit}"
    return f"{count} bytes"


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {"number": "{:,}".format, "size": _size}
