import math
import random
import re

import pytest

from jaxft.evaluation.chart import GROUPS, LABEL_HEIGHT, lowest, make_chart

NAN = math.nan


def texts(marks):
    return [mark.text for mark in marks]


def places(path: str) -> list[list[tuple[float, float]]]:
    """The points of SVG path data, by stretch of joined points."""
    return [
        [tuple(map(float, point.split())) for point in stretch.rstrip("Z").split("L")]
        for stretch in path.split("M")[1:]
    ]


def values(chart, stretch):
    """Step and value of drawn points, read off the axes as a reader would."""
    (x0, *_, x1), (y0, *_, y1) = chart.x_ticks, chart.y_ticks

    def number(text):
        return float(text.replace(",", "").replace("k", "e3"))

    def read(at, first, last, axis):
        a, b = number(first.text), number(last.text)
        return a + (at - first[axis]) * (b - a) / (last[axis] - first[axis])

    return [(read(x, x0, x1, 0), read(y, y0, y1, 1)) for x, y in stretch]


def test_the_curve_reads_off_the_axes_as_what_was_given():
    points = [(10, 2.31), (20, 1.64), (30, 1.25), (40, 1.31)]
    chart = make_chart("Loss", {"loss": points}, last_step=40, from_zero=False)
    assert texts(chart.x_ticks) == ["0", "10", "20", "30", "40"]
    assert texts(chart.y_ticks) == ["1.0", "1.5", "2.0", "2.5"]
    (stretch,) = places(chart.curves[0].line)
    for (step, value), point in zip(values(chart, stretch), points, strict=True):
        assert (step, value) == pytest.approx(point, abs=1e-3)
    assert chart.notes == []
    assert chart.grouped == 1


@pytest.mark.parametrize(
    "low, high, ticks, unit",
    [
        (0, 2e-4, ["0.0", "0.5", "1.0", "1.5", "2.0"], "×10⁻⁴"),
        (0, 12_345, ["0", "5k", "10k", "15k"], ""),
        (0, 3.1e7, ["0", "1", "2", "3", "4"], "×10⁷"),
        (0, 890, ["0", "200", "400", "600", "800", "1,000"], ""),
        (1.4142, 1.4144, ["1.41420", "1.41425", "1.41430", "1.41435", "1.41440"], ""),
        (-3, 2, ["-3", "-2", "-1", "0", "1", "2"], ""),
        (0, 0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"], ""),
        (5, 5, ["4.4", "4.6", "4.8", "5.0", "5.2", "5.4", "5.6"], ""),
        (0, 3.4e38, ["0", "1", "2", "3", "4"], "×10³⁸"),
    ],
)
def test_ticks_are_round_and_hold_the_values(low, high, ticks, unit):
    chart = make_chart("v", {"v": [(1, low), (2, high)]}, last_step=2, from_zero=False)
    assert (texts(chart.y_ticks), chart.unit) == (ticks, unit)
    (stretch,) = places(chart.curves[0].line)
    assert all(0 <= y <= 100 for _, y in stretch)


@pytest.mark.parametrize(
    "last, ticks",
    [
        (0, ["0", "1"]),
        (1, ["0", "1"]),
        (3, ["0", "1", "2", "3"]),
        (200, ["0", "50", "100", "150", "200"]),
        (1234, ["0", "500", "1,000"]),
        (100_000, ["0", "50k", "100k"]),
    ],
)
def test_steps_are_whole_and_few(last, ticks):
    assert texts(make_chart("v", {"v": [(last, 1.0)]}, last_step=last).x_ticks) == ticks


def test_from_zero_keeps_proportions():
    chart = make_chart("v", {"v": [(1, 4.0), (2, 5.0)]}, last_step=2)
    assert texts(chart.y_ticks)[0] == "0"


def test_one_point_is_a_dot():
    chart = make_chart("v", {"v": [(7, 3.0)]}, last_step=7)
    (curve,) = chart.curves
    assert (curve.line, curve.band) == ("", "")
    assert values(chart, curve.dots) == [pytest.approx((7, 3), abs=1e-3)]


def test_not_finite_values_are_gaps_that_are_marked_and_counted():
    points = [(1, 4.0), (2, 3.0), (3, NAN), (4, math.inf), (5, 2.0), (6, -math.inf), (7, 1.0), (8, 1.5)]
    chart = make_chart("Loss", {"training": points}, last_step=8)
    (curve,) = chart.curves
    drawn = [values(chart, stretch) for stretch in places(curve.line)]
    assert drawn == [
        [pytest.approx(point) for point in points[:2]],
        [pytest.approx(point) for point in points[-2:]],
    ]
    assert values(chart, curve.dots) == [pytest.approx((5, 2))]
    assert curve.breaks == [37.5, 50, 75]
    assert chart.notes == ["Training: 3 of 8 values are not finite: gaps in the curve, the first at step 3."]
    assert texts(chart.y_ticks)[-1] == "4"


def test_nothing_finite_leaves_marks_and_no_invented_axis():
    chart = make_chart("v", {"v": [(1, NAN), (2, NAN)]}, last_step=2)
    (curve,) = chart.curves
    assert (curve.line, curve.dots, curve.label, chart.y_ticks) == ("", [], None, [])
    assert curve.breaks == [50, 100]


def test_a_long_log_is_means_in_a_band_of_extremes():
    rng = random.Random(1)
    points = [(step, rng.uniform(1, 2)) for step in range(1, 10_001)]
    points[4999] = (5000, 9.0)
    chart = make_chart("v", {"v": points}, last_step=10_000)
    (curve,) = chart.curves
    ((*line,),) = places(curve.line)
    assert chart.grouped == 10_000 / GROUPS == 25
    assert len(line) == GROUPS
    step, mean = values(chart, line)[0]
    assert step == pytest.approx(sum(step for step, _ in points[:25]) / 25, abs=1)
    assert mean == pytest.approx(sum(value for _, value in points[:25]) / 25, abs=1e-3)
    ((*band,),) = places(curve.band)
    drawn = [value for _, value in values(chart, band)]
    assert max(drawn) == pytest.approx(9.0, abs=2e-3)
    assert min(drawn) == pytest.approx(min(value for _, value in points), abs=2e-3)


def test_a_single_nan_in_a_long_log_still_breaks_the_curve():
    points = [(step, 2.0 + step % 2) for step in range(1, 4001)]
    points[1999] = (2000, NAN)
    (curve,) = make_chart("v", {"v": points}, last_step=4000).curves
    before, after = places(curve.line)
    assert len(before) + len(after) == GROUPS - 1
    assert len(curve.dots) == len(curve.breaks) == 1
    assert before[-1][0] < curve.breaks[0] < after[0][0]
    assert len(places(curve.band)) == 3  # the broken group shows the range of its finite values


def test_every_other_value_missing_does_not_swell_the_chart():
    points = [(step, NAN if step % 2 else 1.0 + step % 3) for step in range(100_000)]
    (curve,) = make_chart("v", {"v": points}, last_step=100_000).curves
    assert len(curve.dots) == len(curve.breaks) == GROUPS


def test_names_of_close_curves_do_not_overlap():
    series = {"training": [(1, 3.0), (2, 1.01)], "held-out": [(1, 3.0), (2, 1.0)]}
    chart = make_chart("Loss", series, last_step=2)
    training, held_out = (curve.label.y for curve in chart.curves)
    assert held_out - training >= LABEL_HEIGHT
    assert [curve.name for curve in chart.curves] == list(series)


def test_the_best_point_is_the_lowest_finite_and_the_first():
    points = [(10, 2.0), (20, -math.inf), (30, 1.5), (40, NAN), (50, 1.5), (60, 1.75)]
    assert lowest(points) == (30, 1.5)
    chart = make_chart("Loss", {"held-out": points}, last_step=60, best_of="held-out")
    assert chart.best.text == "1.500 at step 30"
    assert values(chart, [chart.best[:2]]) == [pytest.approx((30, 1.5), abs=1e-2)]
    assert lowest([(1, NAN)]) is None
    assert make_chart("Loss", {"held-out": [(1, NAN)]}, last_step=1, best_of="held-out").best is None


def test_path_data_is_plain_numbers():
    points = [(step, 1e-12 * step) for step in range(1, 300)]
    (curve,) = make_chart("v", {"v": points}, last_step=300).curves
    assert re.fullmatch(r"(?:[ML]\d+(?:\.\d+)? \d+(?:\.\d+)?)+", curve.line)
