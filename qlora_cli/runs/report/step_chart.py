"""The common parts of a run's charts: the axis of steps, the legend, and the notes with figures."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qlora_cli.charts.axis_range import AxisRange
from qlora_cli.charts.line_chart import Curve, LineChart, Mark, Rule
from qlora_cli.charts.page_svg import Note
from qlora_cli.charts.series import Series, is_drawable, smoothed, thinned
from qlora_cli.runs.history import RunHistory

MAX_STRETCHES = 120
MAX_MARKS = 200
NUM_LEVELS = 5
SIDE_MARGIN = 0.015  # share of the steps, so that marks at the ends are not clipped
UNKNOWN = "\N{EN DASH}"

Item = TypeVar("Item")


@dataclass(frozen=True)
class LegendEntry:
    """An entry of a legend; `kind` is its CSS class."""

    kind: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The labels of a chart; `description` is for screen readers."""

    name: str
    title: str
    unit: str = ""
    remark: str = ""
    description: str
    legend: tuple[LegendEntry, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunChart:
    """A chart of a run with its labels."""

    labels: Labels
    chart: LineChart


@dataclass(frozen=True, kw_only=True)
class Line:
    """A series to draw: its colour, its name, and the format of its figures."""

    color: str
    name: str
    series: Series
    spec: str
    has_mean: bool = False

    def curves(self) -> Iterator[Curve]:
        """Yield the line, or a faint one and its mean; nothing if no value is drawable."""
        if not self.series.drawable:
            return
        means = smoothed(self.series) if self.has_mean else []
        yield Curve(self.color, thinned(self.series), is_faint=bool(means))
        if means:
            yield Curve(self.color, means)


def chart_of(
    history: RunHistory,
    labels: Labels,
    lines: Sequence[Line],
    y: AxisRange,
    *,
    marks: Sequence[Mark] = (),
    rules: Sequence[Rule] = (),
    num_levels: int = NUM_LEVELS,
) -> RunChart:
    """Return a chart of `lines`; those of the optimizer's steps have tooltips."""
    x = step_range(history)
    chart = LineChart(
        x=x,
        y=y,
        x_name="step",
        num_levels=num_levels,
        curves=tuple(curve for line in lines for curve in line.curves()),
        marks=tuple(marks),
        rules=(*_resume_rules(history, x), *rules),
        notes=tuple(_stretches([line for line in lines if line.series.steps is history.steps.step], x)),
    )
    return RunChart(labels=labels, chart=chart)


def step_range(history: RunHistory) -> AxisRange:
    """Return the range of steps that all charts of a run share."""
    steps = [*history.steps.step[:1], *history.steps.step[-1:], *(done.step for done in history.evaluations)]
    low, high = min(steps, default=0), max(steps, default=1)
    margin = (high - low) * SIDE_MARGIN or 0.5
    return AxisRange(low=low - margin, high=high + margin)


def spread_over(items: Sequence[Item]) -> Sequence[Item]:
    """Return at most as many of `items` as a chart can mark, evenly spaced."""
    return items[:: math.ceil(len(items) / MAX_MARKS) or 1]


def _resume_rules(history: RunHistory, x: AxisRange) -> tuple[Rule, ...]:
    steps = sorted({event.step for event in history.resumes})
    return tuple(
        Rule("muted", step, f"resumed after step {step:,}", is_level=False)
        for step in steps[:MAX_MARKS]
        if x.contains(step)
    )


def _stretches(lines: Sequence[Line], x: AxisRange) -> Iterator[Note]:
    """Yield notes for intervals of steps that cover the chart, with the figures of each."""
    steps = lines[0].series.steps
    total = len(steps)
    num_stretches = min(total, MAX_STRETCHES)
    starts = [stretch * total // num_stretches for stretch in range(num_stretches)]
    # An interval begins half-way between its first step and the one before.
    edges = [x.low, *((steps[start - 1] + steps[start]) / 2 for start in starts[1:]), x.high]
    for start, end, left, right in zip(starts, [*starts[1:], total], edges, edges[1:], strict=False):
        first, last = steps[start], steps[end - 1]
        text = [f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"]
        text += [f"{line.name} {_figures(line.series.values[start:end], line.spec)}" for line in lines]
        yield Note("\n".join(text), x=(left, right))


def _figures(values: Sequence[float], spec: str) -> str:
    drawable = [value for value in values if is_drawable(value)]
    if not drawable:
        return UNKNOWN
    low, high = format(min(drawable), spec), format(max(drawable), spec)
    return low if low == high else f"{low} to {high}"
