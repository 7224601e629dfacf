"""A chart of lines over steps, or over a logarithmic axis, with marks, rules across it, and notes as tooltips."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from qlora_cli.charts.axis_range import AxisRange
from qlora_cli.charts.canvas import ChartSize, page_figure
from qlora_cli.charts.page_svg import Note, embedded
from qlora_cli.charts.palette import LIGHT
from qlora_cli.charts.series import Point, Series, is_drawable, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PIXELS_PER_POINT = 0.75  # of the chart's width; more points would be indistinguishable
FAR = 1.0  # times the height of the chart, above and below it: the distance at which lines that leave it are clipped
DASHES = (0, (4, 3))  # times the line's width


@dataclass(frozen=True)
class Curve:
    """A line through points in order; `color` is a name of the palette."""

    color: str
    points: Sequence[Point]
    is_faint: bool = False


@dataclass(frozen=True)
class MarkLook:
    """A dot or a ring; `color` is a name of the palette, `pixels` its diameter."""

    color: str
    pixels: float
    is_ring: bool = False


@dataclass(frozen=True)
class Mark:
    """A single point, with its note."""

    look: MarkLook
    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Rule:
    """A dashed line across the chart with its note: at a value, or at a step. `color` is a name of the palette."""

    color: str
    at: float
    text: str
    is_level: bool


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """The content of a chart.

    Attributes:
        x: The range of steps; of any values if it is logarithmic.
        y: The range of values.
        x_name: The label of the axis of steps.
        num_levels: The largest number of ticks on the axis of values.
        curves: The curves; later ones are on top.
        rules: Lines across the chart.
        marks: The marks; later ones are on top.
        notes: The notes of intervals of steps.
    """

    x: AxisRange
    y: AxisRange
    x_name: str
    num_levels: int
    curves: tuple[Curve, ...] = ()
    rules: tuple[Rule, ...] = ()
    marks: tuple[Mark, ...] = ()
    notes: tuple[Note, ...] = ()


def embedded_line_chart(chart: LineChart, name: str, sizes: Sequence[ChartSize], *, description: str) -> str:
    """Return a chart as SVG in all `sizes`, of which the page shows one. Call it within `drawing_style`."""
    notes = [*chart.notes, *_rule_notes(chart), *(Note(mark.text, mark.x, mark.y) for mark in chart.marks)]
    return "".join(
        embedded(draw_line_chart(chart, size), f"{name} {size.name}", notes, size=size.name, description=description)
        for size in sizes
    )


def _rule_notes(chart: LineChart) -> Iterator[Note]:
    for rule in chart.rules:
        yield Note(rule.text, y=rule.at) if rule.is_level else Note(rule.text, x=rule.at)


def draw_line_chart(chart: LineChart, size: ChartSize) -> "Figure":
    """Return the figure of a chart. Call it within `drawing_style`."""
    is_whole = not chart.x.is_log
    x_ticks, y_ticks = chart.x.ticks(size.num_ticks, is_whole=is_whole), chart.y.ticks(chart.num_levels)
    figure, axes = page_figure(
        size, left_labels=[label for _, label in y_ticks], low_labels=[label for _, label in x_ticks]
    )
    if chart.x.is_log:
        axes.set_xscale("log")
    if chart.y.is_log:
        axes.set_yscale("log")
    axes.set(xlim=(chart.x.low, chart.x.high), ylim=(chart.y.low, chart.y.high), xlabel=chart.x_name)
    for axis, ticks in ((axes.xaxis, x_ticks), (axes.yaxis, y_ticks)):
        axis.set_ticks([value for value, _ in ticks], [label for _, label in ticks])
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    max_points = int(axes.bbox.width / PIXELS_PER_POINT)
    for curve in chart.curves:
        _draw_curve(axes, curve, chart.y, max_points)
    for rule in chart.rules:
        (axes.axhline if rule.is_level else axes.axvline)(
            rule.at, color=getattr(LIGHT, rule.color), linewidth=1.25, linestyle=DASHES
        )
    for look, marks in groupby(chart.marks, key=lambda mark: mark.look):
        _draw_marks(axes, look, list(marks))
    return figure


def _draw_curve(axes: "Axes", curve: Curve, y: AxisRange, max_points: int) -> None:
    steps, values = zip(*curve.points, strict=True)
    points = list(_drawn_points(thinned(Series(steps, values), max_points), y))
    axes.plot(
        [step for step, _ in points],
        [value for _, value in points],
        color=getattr(LIGHT, curve.color),
        linewidth=1 if curve.is_faint else 1.75,
        alpha=0.4 if curve.is_faint else None,
        solid_capstyle="round",
    )


def _drawn_points(points: Sequence[Point], y: AxisRange) -> Iterator[Point]:
    """Yield the points to draw: gaps as NaN, distant points clipped, one between two gaps as a line of length 0."""
    low, high = y.at(-FAR), y.at(1 + FAR)
    is_gap = [True, *(not is_drawable(value) for _, value in points), True]
    for index, (step, value) in enumerate(points, start=1):
        point = (step, float("nan") if is_gap[index] else min(max(value, low), high))
        yield point
        if is_gap[index - 1] and is_gap[index + 1]:
            yield point


def _draw_marks(axes: "Axes", look: MarkLook, marks: Sequence[Mark]) -> None:
    color, edge = getattr(LIGHT, look.color), look.pixels / 4 if look.is_ring else 0
    axes.plot(
        [mark.x for mark in marks],
        [mark.y for mark in marks],
        linestyle="none",
        marker="o",
        markersize=look.pixels - edge,
        markerfacecolor=LIGHT.page if look.is_ring else color,
        markeredgecolor=color,
        markeredgewidth=edge,
        clip_on=False,
        zorder=3,
    )
