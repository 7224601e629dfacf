"""A long series made short enough to draw: spikes are kept, noise is smoothed, gaps stay gaps."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from qlora_cli.runs.report.axis import Axis, is_drawable

MOST_POINTS = 1000
SMOOTH_POINTS = 500
FEWEST_TO_SMOOTH = 10
LEAST_WINDOW, MOST_WINDOW = 5, 2001
OUTLIERS = 0.1  # share of a window, at each end, that its mean leaves out
WIDTH, HEIGHT = 2000, 1000  # units of a drawing

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Values by step, in order; what is no drawable number is a gap."""

    steps: Sequence[int]
    values: Sequence[float]

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def drawable(self) -> list[float]:
        """The values that can be drawn."""
        return [value for value in self.values if is_drawable(value)]


def thinned(series: Series, most: int = MOST_POINTS) -> list[Point]:
    """Return at most `most` points: of each stretch the lowest and the highest, in their order.

    A stretch without a drawable value is a gap: a point whose value is NaN.
    """
    total = len(series)
    points: list[Point] = []
    if total <= most:
        points += zip(series.steps, series.values, strict=True)
        return points
    num_stretches = most // 2
    for stretch in range(num_stretches):
        places = range(stretch * total // num_stretches, (stretch + 1) * total // num_stretches)
        drawable = [place for place in places if is_drawable(series.values[place])]
        if not drawable:
            points.append((series.steps[places[0]], float("nan")))
            continue
        low, high = min(drawable, key=series.values.__getitem__), max(drawable, key=series.values.__getitem__)
        points += [(series.steps[place], series.values[place]) for place in sorted({low, high})]
    return points


def window_of(num_steps: int) -> int:
    """Return how many steps are averaged: a fortieth of them, an odd number."""
    return min(MOST_WINDOW, max(LEAST_WINDOW, num_steps // 40)) | 1


def smoothed(series: Series) -> list[Point]:
    """Return means over the steps around, their outliers left out; nothing of a series that is too short for it.

    At the beginning the window shrinks to what lies on both sides, so that a steep fall is not flattened.
    """
    total = len(series)
    if total < FEWEST_TO_SMOOTH:
        return []
    half = window_of(total) // 2
    places = (
        range(total)
        if total <= SMOOTH_POINTS
        else [point * (total - 1) // (SMOOTH_POINTS - 1) for point in range(SMOOTH_POINTS)]
    )
    points: list[Point] = []
    for place in places:
        reach = min(half, place)
        window = sorted(filter(is_drawable, series.values[place - reach : place + reach + 1]))
        left_out = int(len(window) * OUTLIERS)
        kept = window[left_out : len(window) - left_out]
        points.append((series.steps[place], sum(kept) / len(kept) if kept else float("nan")))
    return points


def path_of(points: Sequence[Point], across: Axis, up: Axis) -> str:
    """Return the line through `points` as the data of an SVG path; a point alone is a line of no length."""
    parts: list[str] = []
    is_down = False
    for step, value in points:
        if not is_drawable(value):
            is_down = False
            continue
        x, y = drawn(step, value, across, up)
        parts.append(f"L{x} {y}" if is_down else f"M{x} {y}h.01")
        is_down = True
    return "".join(parts)


def drawn(step: float, value: float, across: Axis, up: Axis) -> tuple[int, int]:
    """Return where a point stands in a drawing; one that is far outside of it is just outside."""
    height = min(2.0, max(-1.0, up.place(value)))
    return round(WIDTH * across.place(step)), round(HEIGHT * (1 - height))
