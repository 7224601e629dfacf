"""A histogram: bars of equal width for the stretches of an axis, whatever those span, and a limit across it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from qlora_cli.charts.axis_range import AxisRange
from qlora_cli.charts.canvas import ChartSize, clear_frame, page_figure
from qlora_cli.charts.line_chart import DASHES
from qlora_cli.charts.page_svg import Note, embedded
from qlora_cli.charts.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE_COUNTS = 1000  # times, from the lowest to the highest bar: above, a linear axis shows only the high ones
BAR_GAP = 0.04
NEAR = 0.03  # times the width of the bars, where the line stands that can't be drawn to scale
NUM_LEVELS = 5
LEFT, TOP = 28, 24  # pixels: for the name of the axis, and for the label of the limit


@dataclass(frozen=True)
class LimitLine:
    """A dashed line across a histogram.

    Attributes:
        place: In bars from the left: 1.5 is the middle of the second.
        label: Stands at the upper end of the line.
        is_far: It would make the bars small: it stands next to the last one, and its label says that it is farther.
        is_exceeded: What lies beyond it has a colour of its own.
    """

    place: float
    label: str
    is_far: bool
    is_exceeded: bool


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """What a histogram shows.

    Attributes:
        edges: The values between the bars, and at both ends.
        counts: The height of each bar.
        limit: Marked by a line.
        x_name: Stands below the axis.
        y_name: What is counted.
        notes: Of each bar.
    """

    edges: tuple[int, ...]
    counts: tuple[int, ...]
    limit: LimitLine
    x_name: str
    y_name: str
    notes: tuple[str, ...]


def embedded_histogram(chart: Histogram, name: str, sizes: Sequence[ChartSize], *, description: str) -> str:
    """Return a histogram as SVG, once for each of `sizes`, of which the page shows one. To call in `drawing_style`."""
    notes = [Note(text, x=(place, place + 1)) for place, text in enumerate(chart.notes)]
    return "".join(
        embedded(draw_histogram(chart, size), f"{name} {size.name}", notes, size=size.name, description=description)
        for size in sizes
    )


def draw_histogram(chart: Histogram, size: ChartSize) -> "Figure":
    """Return the figure of a histogram. To call in `drawing_style`."""
    up = _up(chart.counts)
    levels = up.ticks(NUM_LEVELS, is_whole=True)
    levels = [(value, label) for value, label in levels if value >= 1 or not up.is_log]
    x_ticks = edge_ticks(chart.edges, size.num_ticks)
    figure, axes = page_figure(
        size,
        left_labels=[label for _, label in levels],
        low_labels=[f"{edge:,}" for edge in x_ticks.values()],
        left=LEFT,
        top=TOP,
    )
    if up.is_log:
        axes.set_yscale("log")
    _draw_bars(axes, chart)
    axes.set_xticks(list(x_ticks), [f"{edge:,}" for edge in x_ticks.values()])
    axes.set(xlim=(0, len(chart.counts)), ylim=(up.low, up.high), xlabel=chart.x_name)
    axes.set_yticks([value for value, _ in levels], [label for _, label in levels])
    axes.set_ylabel(f"{chart.y_name}, logarithmic" if up.is_log else chart.y_name)
    axes.minorticks_off()
    clear_frame(axes, "y")
    axes.spines["left"].set_visible(False)
    _draw_limit(axes, chart.limit, len(chart.counts))
    return figure


def _up(counts: Sequence[int]) -> AxisRange:
    seen = [count for count in counts if count]
    if max(seen) > WIDE_COUNTS * min(seen):
        return AxisRange(low=0.5, high=2 * max(seen), is_log=True)
    return AxisRange(low=0, high=1.05 * max(seen))


def _draw_bars(axes: "Axes", chart: Histogram) -> None:
    end = chart.limit.place if chart.limit.is_exceeded else math.inf
    for place, count in enumerate(chart.counts):
        left, right = place + BAR_GAP, place + 1 - BAR_GAP
        for start, stop, color in ((left, min(right, end), LIGHT.first), (max(left, end), right, LIGHT.second)):
            if count and stop > start:
                axes.bar(start, count, width=stop - start, align="edge", color=color, linewidth=0)


def edge_ticks(edges: Sequence[int], most: int) -> dict[int, int]:
    """Return edges to write between bars, by their places: multiples of one number, or of every so many bars."""
    step = math.ceil(len(edges) / most)
    widths = {after - edge for edge, after in pairwise(edges)}
    if len(widths) > 1:
        return dict(list(enumerate(edges))[::step])
    (width,) = widths
    return {place: edge for place, edge in enumerate(edges) if edge % (step * width) == 0}


def _draw_limit(axes: "Axes", limit: LimitLine, num_bars: int) -> None:
    at = (1 + NEAR) * num_bars if limit.is_far else limit.place
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
