"""A histogram: bars of equal width for intervals of any width, and a line for a limit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from qlora_cli.charts.axis_range import AxisRange
from qlora_cli.charts.canvas import ChartSize, page_figure
from qlora_cli.charts.line_chart import DASHES
from qlora_cli.charts.page_svg import Note, embedded
from qlora_cli.charts.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE_COUNTS = 1000  # ratio of the highest to the lowest bar above which a linear axis would hide the low ones
BAR_GAP = 0.04
NEAR = 0.03  # distance from the bars of a limit that can't be drawn to scale, as a share of their total width
NUM_LEVELS = 5
LEFT, TOP = 28, 24  # pixels: for the label of the axis, and for that of the limit


@dataclass(frozen=True)
class LimitLine:
    """A dashed line across a histogram.

    Attributes:
        position: In bars from the left: 1.5 is the middle of the second.
        label: Its label, at the upper end of the line.
        is_far: Whether it would make the bars small: then it is drawn next to the last bar, and its label says so.
        is_exceeded: Whether bars beyond it have another colour.
    """

    position: float
    label: str
    is_far: bool
    is_exceeded: bool


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """The content of a histogram.

    Attributes:
        edges: The values between the bars, and at both ends.
        counts: The height of each bar.
        limit: The limit, shown as a line.
        x_name: The label of the axis.
        y_name: What is counted.
        notes: The note of each bar.
    """

    edges: tuple[int, ...]
    counts: tuple[int, ...]
    limit: LimitLine
    x_name: str
    y_name: str
    notes: tuple[str, ...]


def embedded_histogram(chart: Histogram, name: str, sizes: Sequence[ChartSize], *, description: str) -> str:
    """Return a histogram as SVG in all `sizes`, of which the page shows one. Call it within `drawing_style`."""
    notes = [Note(text, x=(index, index + 1)) for index, text in enumerate(chart.notes)]
    return "".join(
        embedded(draw_histogram(chart, size), f"{name} {size.name}", notes, size=size.name, description=description)
        for size in sizes
    )


def draw_histogram(chart: Histogram, size: ChartSize) -> "Figure":
    """Return the figure of a histogram. Call it within `drawing_style`."""
    count_axis = _count_axis(chart.counts)
    levels = count_axis.ticks(NUM_LEVELS, is_whole=True)
    levels = [(value, label) for value, label in levels if value >= 1 or not count_axis.is_log]
    x_ticks = edge_ticks(chart.edges, size.num_ticks)
    figure, axes = page_figure(
        size,
        left_labels=[label for _, label in levels],
        low_labels=[f"{edge:,}" for edge in x_ticks.values()],
        left=LEFT,
        top=TOP,
    )
    if count_axis.is_log:
        axes.set_yscale("log")
    _draw_bars(axes, chart)
    axes.set_xticks(list(x_ticks), [f"{edge:,}" for edge in x_ticks.values()])
    axes.set(xlim=(0, len(chart.counts)), ylim=(count_axis.low, count_axis.high), xlabel=chart.x_name)
    axes.set_yticks([value for value, _ in levels], [label for _, label in levels])
    axes.set_ylabel(f"{chart.y_name}, logarithmic" if count_axis.is_log else chart.y_name)
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    _draw_limit(axes, chart.limit, len(chart.counts))
    return figure


def _count_axis(counts: Sequence[int]) -> AxisRange:
    nonzero = [count for count in counts if count]
    if max(nonzero) > WIDE_COUNTS * min(nonzero):
        return AxisRange(low=0.5, high=2 * max(nonzero), is_log=True)
    return AxisRange(low=0, high=1.05 * max(nonzero))


def _draw_bars(axes: "Axes", chart: Histogram) -> None:
    end = chart.limit.position if chart.limit.is_exceeded else math.inf
    for index, count in enumerate(chart.counts):
        left, right = index + BAR_GAP, index + 1 - BAR_GAP
        for start, stop, color in ((left, min(right, end), LIGHT.first), (max(left, end), right, LIGHT.second)):
            if count and stop > start:
                axes.bar(start, count, width=stop - start, align="edge", color=color, linewidth=0)


def edge_ticks(edges: Sequence[int], max_ticks: int) -> dict[int, int]:
    """Return the edges to label, by index: multiples of one number or, for bars of unequal width, every nth edge."""
    step = math.ceil(len(edges) / max_ticks)
    widths = {after - edge for edge, after in pairwise(edges)}
    if len(widths) > 1:
        return dict(list(enumerate(edges))[::step])
    (width,) = widths
    return {index: edge for index, edge in enumerate(edges) if edge % (step * width) == 0}


def _draw_limit(axes: "Axes", limit: LimitLine, num_bars: int) -> None:
    at = (1 + NEAR) * num_bars if limit.is_far else limit.position
    right = max(num_bars, at) + BAR_GAP
    axes.set_xlim(0, right)
    axes.axvline(at, linestyle=DASHES, linewidth=1, color=LIGHT.ink)
    axes.annotate(
        f"{limit.label}{' →' if limit.is_far else ''}",
        xy=(at, 1),
        xytext=(0, 4),
        xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
        ha="right" if at > right / 2 else "left",
    )
