"""A long series made short enough to draw: spikes stay, noise is smoothed, gaps stay gaps."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

MAX_POINTS = 1000
SMOOTH_POINTS = 500
FEWEST_TO_SMOOTH = 10
MIN_WINDOW, MAX_WINDOW = 5, 2001
OUTLIERS = 0.1  # share of a window, at each end, that its mean leaves out
LARGEST = 1e100  # beyond, differences could overflow: drawn like what is not a number

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Values by step, in order; a value that is not drawable is a gap."""

    steps: Sequence[int]
    values: Sequence[float]

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def drawable(self) -> list[float]:
        """The values that can be drawn."""
        return [value for value in self.values if is_drawable(value)]


def is_drawable(value: float) -> bool:
    """Return whether a value is a number, and not so large that it breaks an axis."""
    return -LARGEST < value < LARGEST


def thinned(series: Series, most: int = MAX_POINTS) -> list[Point]:
    """Return at most `most` points: the lowest and the highest of each stretch, in their order.

    A stretch without a drawable value is a gap: a point whose value is NaN.
    """
    total = len(series)
    if total <= most:
        return list(zip(series.steps, series.values, strict=True))
    points: list[Point] = []
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
    return min(MAX_WINDOW, max(MIN_WINDOW, num_steps // 40)) | 1


def smoothed(series: Series) -> list[Point]:
    """Return means over the steps around, without their outliers; nothing for a series that is too short.

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
        averaged = window[left_out : len(window) - left_out]
        points.append((series.steps[place], sum(averaged) / len(averaged) if averaged else float("nan")))
    return points
