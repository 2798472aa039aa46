import json
import math
import random
import re
import resource
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest

from jaxft.data.prepare import Report, SourceReport
from jaxft.evaluation.report import ExactMatch, ReportData, Sample, write_report
from jaxft.models.count import ParameterCount

VOID = {"meta", "br"}
SOURCE = SourceReport("data/a.jsonl", "messages", 11934, 212, 3, 41, 11681, 3_188_402, 1_402_118, 6120)
HELD_OUT = SourceReport("data/b.csv", "alpaca", 517, 16, 9, 1, 500, 91_204, 60_313, 702)
RUN = ReportData(
    model="org/some-model",
    method="LoRA r=16 alpha=32 on 7 kinds of modules, NF4 base",
    data=Report((SOURCE,), (HELD_OUT,), 11677, 500, 4, 3_150_222, 1_400_021),
    parameters=[
        ParameterCount("nf4", 106_168_320, 54_743_040, False),
        ParameterCount("float32", 4_884_480, 19_537_920, True),
    ],
    seen=934,
    epochs=0.08,
    exported_step=300,
    batch=(4, 2, 8),
    device="8 × TPU v5e",
    seconds=4980.4,
    finished=datetime(2026, 3, 4, 14, 5, tzinfo=UTC),
    versions={"jaxft": "0.1.0", "jax": "0.10.2"},
    exact_match=ExactMatch(base=59, tuned=237, examples=500),
)
SAMPLES = [
    Sample("What is <script>alert(1)</script> & why?", "A script.", "No <b>idea</b>", " A script.\n"),
    Sample("\"quoted\" 'text'\n  indented", "same", "", "other"),
]


def records(count: int, every: int = 10, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    lines = [{"step": 0, "eval_loss": 2.5}]
    for i in range(1, count + 1):
        step = every * i
        line = {"step": step, "epoch": 3 * i / count, "loss": 1 + rng.random(), "grad_norm": rng.random()}
        line |= {"learning_rate": 2e-4 * (1 - i / count), "tokens": 1000 * step, "skipped_updates": 0}
        lines.append(line | {"tokens_per_second": 12_000 + rng.randrange(500)})
        if i % max(count // 10, 1) == 0:
            lines.append({"step": step, "eval_loss": 1.2 + abs(i / count - 0.6)})
    return lines


class Page(HTMLParser):
    """Parses a page, checks that every tag is closed in order, and keeps tags and text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        assert len(attributes) == len(dict(attributes)), f"an attribute twice in {tag}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open and "title" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("\n".join(self.words).split())

    def of_class(self, name: str) -> list[dict]:
        return [attributes for _, attributes in self.tags if name in attributes.get("class", "").split()]


@pytest.fixture
def render(tmp_path):
    def render(lines, run=RUN, samples=(), title="A run") -> Page:
        write_report(tmp_path / "report.html", title=title, run=run, records=lines, samples=samples)
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return render


def test_a_full_disk_is_said_and_leaves_the_report_that_was_there(render, tmp_path):
    render(records(5))
    before = (tmp_path / "report.html").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        expected = r"/report\.html could not be written: File too large; make room there; what was trained is complete"
        with pytest.raises(OSError, match=expected):
            render(records(5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_bytes() == before


def test_the_page_is_self_contained(render, tmp_path):
    page = render(records(50), samples=SAMPLES)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|javascript:", html)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "a", "form"})
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert {"src", "href", "srcset"}.isdisjoint(key for _, attributes in page.tags for key in attributes)
    (policy,) = (a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_numbers_shown_are_the_numbers_given(render):
    text = render(records(50)).text
    for shown in (
        "org/some-model LoRA r=16 alpha=32 on 7 kinds of modules, NF4 base 2026-03-04 14:05 UTC",
        "Held-out loss 1.200 lowest, at step 300; 1.600 at the end, 2.500 before training",
        "Exact match 47.4% of 500 held-out answers; 11.8% before training",
        "Trained on 500,000 tokens, 934 examples: 0.08 epochs of 11,677",
        "Time 1 h 23 min 8 × TPU v5e",
        "1.200 at step 300",
        "data/a.jsonl messages 11,934 212 41 11,681 3 3,188,402 1,402,118 6,120",
        "data/b.csv (held out) alpaca 517 16 1 500 9 91,204 60,313 702",
        "Training on 11,677 examples with 3,150,222 tokens, 1,400,021 of them learned.",
        "500 examples held out, 4 of them because an equal example is.",
        "nf4 no 106,168,320 95.60 % 52.21 MiB",
        "float32 yes 4,884,480 4.40 % 18.63 MiB",
        "Total 111,052,800 70.84 MiB",
        "Updates 500",
        "Epochs 0.08",
        "Exported the weights after update 300",
        "Rows per update 64 4 per micro-batch × 2 accumulated × 8 data-parallel",
        "Versions jaxft 0.1.0, jax 0.10.2",
    ):
        assert shown in text


def test_the_throughput_is_the_median(render):
    lines = [{"step": step, "loss": 1.0, "tokens_per_second": speed} for step, speed in ((1, 10), (2, 999), (3, 700))]
    assert "Median throughput 700 tokens/s" in render(lines).text


@pytest.mark.parametrize(
    "seconds, shown",
    [(0.2, "0 s"), (59.6, "1 min 0 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (400_000, "111 h 6 min")],
)
def test_durations(render, seconds, shown):
    assert f"Time {shown} cpu" in render(records(1), replace(RUN, seconds=seconds, device="cpu")).text


def test_text_from_outside_is_shown_and_never_run(render):
    attack = '"><script>alert(1)</script>{{ 7*7 }}<!--'
    source = replace(SOURCE, path=attack)
    run = replace(RUN, model=attack, method=attack, device=attack, versions={attack: attack})
    run = replace(run, data=replace(RUN.data, sources=(source,)), parameters=[ParameterCount(attack, 1, 1, True)])
    page = render(records(5), run, [Sample(attack, attack, attack, attack), *SAMPLES], title=attack)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(attack) >= 11
    assert "What is <script>alert(1)</script> & why?" in page.text
    assert "\"quoted\" 'text'\n  indented" in "".join(page.words)


def test_answers_stand_side_by_side_and_equal_ones_are_named(render):
    page = render(records(5), samples=SAMPLES)
    assert "Reference A script. Base model No <b>idea</b> Tuned model = reference A script." in page.text
    assert "Reference same Base model no text Tuned model other" in page.text
    assert len(page.of_class("same")) == 1
    assert len(page.of_class("tuned")) == 2
    assert "Held-out prompts" not in render(records(5)).text


def test_text_that_utf8_cannot_hold_is_written_visibly(render):
    assert r"lone \ud800 surrogate" in render(records(5), samples=[Sample("lone \ud800 surrogate", "", "", "")]).text


def test_not_finite_losses_are_gaps_and_counted_however_they_were_written(render):
    lines = records(20)
    bad = {50: {"loss": "NaN"}, 60: {"loss": "Infinity"}}
    broken = [line | bad.get(line["step"], {}) if "loss" in line else line for line in lines]
    page = render(broken)
    assert "Training: 2 of 20 values are not finite: gaps in the curve, the first at step 50." in page.text
    (mark,) = page.of_class("break")
    assert mark["d"].count("M") == 2
    as_floats = [{key: float(v) if isinstance(v, str) else v for key, v in line.items()} for line in broken]
    assert render(as_floats).tags == page.tags
    (training,) = (a for a in page.of_class("line") if a["d"].count("M") == 2)
    assert training["d"].count("L") == 20 - 2 - 2


def test_skipped_updates_are_told(render):
    lines = [*records(5), {"step": 51, "loss": math.nan, "skipped_updates": 3}]
    assert "Updates 51 3 skipped, not finite" in render(lines).text


def test_no_evaluation_was_finite(render):
    lines = [{"step": 1, "loss": 1.0}, {"step": 1, "eval_loss": "NaN"}, {"step": 2, "eval_loss": "Infinity"}]
    assert "Held-out loss not finite in any of 2 evaluations" in render(lines).text


def test_order_does_not_matter_and_a_repeated_step_counts_once(render):
    lines = records(30)
    page = render(lines)
    shuffled = lines.copy()
    random.Random(3).shuffle(shuffled)
    assert render(shuffled).tags == page.tags
    abandoned = [line | {key: 77.0 for key in ("loss", "eval_loss") if key in line} for line in lines[20:]]
    assert render([*lines[:20], *abandoned, *lines[20:]]).tags == page.tags


def test_one_record_is_enough(render):
    page = render([{"step": 1, "loss": 2.125}], replace(RUN, exact_match=None))
    assert "Training loss 2.125 at step 1; nothing was held out" in page.text
    assert "Exact match" not in page.text
    assert len(page.of_class("dot")) == 1
    assert len(page.of_class("large")) == 1
    assert len(page.of_class("small")) == 0


def test_a_run_without_records_still_has_a_report(render):
    page = render([])
    assert "Trained on 3,150,222 tokens" in page.text
    assert "svg" not in {tag for tag, _ in page.tags}


def test_a_long_run_is_a_small_page(render, tmp_path):
    lines = [json.loads(json.dumps(line)) for line in records(100_000, every=1)]
    page = render(lines, samples=SAMPLES)
    assert (tmp_path / "report.html").stat().st_size < 200_000
    assert "Long curves: each point is the mean of up to 250 records in a row, the band is their range." in page.text
    assert "Long curves" not in render(records(100)).text


def test_a_failure_leaves_the_old_report(render, tmp_path):
    render(records(5), title="Old")
    with pytest.raises(ValueError, match="could not convert"):
        render([{"step": 1, "loss": "much"}], title="New")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "<title>Old</title>" in (tmp_path / "report.html").read_text()
