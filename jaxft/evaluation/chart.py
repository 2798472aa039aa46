"""Curves over training steps, as positions that a page can draw at any width.

All positions are percentages of the plot area, y counted from the top, so a page can stretch the curves
without stretching lines or text. What is not finite breaks its curve and leaves a mark; nothing is bridged or
left out. A long log is drawn as groups of consecutive records: a curve of their means, in a band from the
lowest to the highest of each group.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

GROUPS = 400
"""Points of the longest curve."""

LABEL_HEIGHT = 8.0
"""Percent of the plot's height between the names of two curves."""

Points = Sequence[tuple[int, float]]
"""(step, value) by ascending step; a value may be NaN or infinite."""


class Mark(NamedTuple):
    """Text at a place: a tick, the name of a curve, a point worth naming."""

    x: float
    y: float
    text: str


class Curve(NamedTuple):
    """One series: SVG path data, the places of lone points, the x of breaks, and where its name goes."""

    name: str
    line: str
    band: str
    dots: list[tuple[float, float]]
    breaks: list[float]
    label: Mark | None  # None where nothing is finite


class Chart(NamedTuple):
    title: str
    unit: str
    x_ticks: list[Mark]
    y_ticks: list[Mark]
    curves: list[Curve]
    best: Mark | None
    notes: list[str]
    grouped: int  # records behind one point, at most


def lowest(points: Points) -> tuple[int, float] | None:
    """The point with the lowest finite value, the first of equals."""
    finite = [point for point in points if math.isfinite(point[1])]
    return min(finite, key=lambda point: point[1], default=None)


def make_chart(
    title: str,
    series: dict[str, Points],
    *,
    unit: str = "",
    last_step: int,
    from_zero: bool = True,
    best_of: str | None = None,
) -> Chart:
    """A chart of series by name; they share both axes.

    Args:
      unit: of the values.
      last_step: right end of the x axis, which begins at 0.
      from_zero: begin the y axis at 0, rather than near the lowest value.
      best_of: the series whose lowest point is to be named.
    """
    groups = {name: _group(points) for name, points in series.items()}
    drawn = [group for one in groups.values() for group in one if group.finite]
    low = min((group.low for group in drawn), default=0.0)
    high = max((group.high for group in drawn), default=1.0)
    x = _Axis.of_steps(last_step)
    y = _Axis.around(min(low, 0.0) if from_zero else low, high)
    power = y.power_of_ten()

    def place(step: float, value: float) -> tuple[float, float]:
        return x.percent(step), round(100 - y.percent(value), 2)

    best = lowest(series[best_of]) if best_of else None
    return Chart(
        title=title,
        unit=" ".join(filter(None, [f"×10{str(power).translate(_SUPERSCRIPT)}" if power else "", unit])),
        x_ticks=[Mark(*place(value, y.low), text) for value, text in x.ticks()],
        y_ticks=[Mark(*place(0, value), text) for value, text in y.ticks(power)] if drawn else [],
        curves=_spread_labels([_curve(name, one, place) for name, one in groups.items()]),
        best=Mark(*place(*best), f"{best[1]:#.4g} at step {best[0]:,}") if best else None,
        notes=[f"{name.capitalize()}: {note}" for name, points in series.items() if (note := _note(points))],
        grouped=max(_group_size(points) for points in series.values()),
    )


class _Group(NamedTuple):
    step: float
    mean: float  # of the finite values, as are low and high
    low: float
    high: float
    finite: int  # how many values are
    broken: bool  # not all values are


class _Axis(NamedTuple):
    low: float
    high: float
    tick: float

    @classmethod
    def of_steps(cls, last: int) -> "_Axis":
        last = max(last, 1)
        return cls(0, last, max(1.0, _round_up(last / 4)))

    @classmethod
    def around(cls, low: float, high: float) -> "_Axis":
        """From tick to tick around these values, which may be equal."""
        size = max(abs(low), abs(high))
        if high - low <= max(1e-6 * size, 1e-30):
            low, high = low - 0.1 * size, high + (0.1 * size or 1.0)
        tick = _round_up((high - low) / 5)
        return cls(math.floor(low / tick + 1e-9) * tick, math.ceil(high / tick - 1e-9) * tick, tick)

    def percent(self, value: float) -> float:
        return round(100 * (value - self.low) / (self.high - self.low), 2)

    def ticks(self, power: int = 0) -> Iterator[tuple[float, str]]:
        """Values and their texts, in units of 10 to the `power`."""
        unit = self.tick / 10.0**power
        decimals = max(0, -math.floor(math.log10(unit) + 1e-9))
        for i in range(math.ceil(self.low / self.tick - 1e-9), math.floor(self.high / self.tick + 1e-9) + 1):
            thousands = f"{i * unit / 1000:g}k" if i else "0"
            yield i * self.tick, thousands if unit >= 1000 else f"{i * unit:,.{decimals}f}"

    def power_of_ten(self) -> int:
        """The power to take out of the tick texts, or 0 where they are short without."""
        power = math.floor(math.log10(max(abs(self.low), abs(self.high))))
        return 0 if -3 < power < 6 else power


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _round_up(size: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= size * (1 - 1e-9))


def _group_size(points: Points) -> int:
    return max(1, math.ceil(len(points) / GROUPS))


def _group(points: Points) -> list[_Group]:
    size = _group_size(points)
    groups = []
    for start in range(0, len(points), size):
        chunk = points[start : start + size]
        step = sum(step for step, _ in chunk) / len(chunk)
        values = [value for _, value in chunk if math.isfinite(value)]
        mean = math.fsum(values) / len(values) if values else math.nan
        low, high = min(values, default=math.nan), max(values, default=math.nan)
        groups.append(_Group(step, mean, low, high, len(values), len(values) < len(chunk)))
    return groups


def _curve(name: str, groups: list[_Group], place: Callable[[float, float], tuple[float, float]]) -> Curve:
    def path(places: list[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{a:g} {b:g}" for a, b in places)

    line, band, dots = [], [], []
    for run in _unbroken(groups):
        middle = [place(group.step, group.mean) for group in run]
        if len(run) == 1:
            dots += middle
        else:
            line.append(path(middle))
        if any(group.low < group.high for group in run):
            upper = [place(group.step, group.high) for group in run]
            lower = [place(group.step, group.low) for group in reversed(run)]
            band.append(path(upper + lower) + "Z")
    ends = [Mark(100, place(group.step, group.mean)[1], name) for group in groups if group.finite]
    breaks = [place(group.step, 0)[0] for group in groups if group.broken]
    return Curve(name, "".join(line), "".join(band), dots, breaks, ends[-1] if ends else None)


def _unbroken(groups: list[_Group]) -> Iterator[list[_Group]]:
    """Runs to be joined by a line. A broken group stands alone, so that the finite values it has show."""
    run: list[_Group] = []
    for group in groups:
        if not group.broken:
            run.append(group)
            continue
        if run:
            yield run
            run = []
        if group.finite:
            yield [group]
    if run:
        yield run


def _spread_labels(curves: list[Curve]) -> list[Curve]:
    """Move names down where they would overlap."""
    free = -math.inf
    spread = {}
    for curve in sorted((curve for curve in curves if curve.label), key=lambda curve: curve.label.y):
        label = curve.label._replace(y=max(curve.label.y, free))
        free = label.y + LABEL_HEIGHT
        spread[curve.name] = curve._replace(label=label)
    return [spread.get(curve.name, curve) for curve in curves]


def _note(points: Points) -> str | None:
    steps = [step for step, value in points if not math.isfinite(value)]
    if not steps:
        return None
    count = f"{len(steps):,} of {len(points):,} values are not finite"
    return f"{count}: gaps in the curve, the first at step {steps[0]:,}."
