"""Reduce a long series for drawing: spikes and gaps remain, noise is smoothed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

MAX_POINTS = 1000
SMOOTH_POINTS = 500
FEWEST_TO_SMOOTH = 10
MIN_WINDOW, MAX_WINDOW = 5, 2001
OUTLIERS = 0.1  # share of a window, at each end, that its mean leaves out
LARGEST = 1e100  # larger values are treated like NaN, because their differences could overflow

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Values by step, in order; a value that can't be drawn is a gap."""

    steps: Sequence[int]
    values: Sequence[float]

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def drawable(self) -> list[float]:
        """The values that can be drawn."""
        return [value for value in self.values if is_drawable(value)]


def is_drawable(value: float) -> bool:
    """Return whether a value is a number, and small enough for an axis."""
    return -LARGEST < value < LARGEST


def thinned(series: Series, max_points: int = MAX_POINTS) -> list[Point]:
    """Return at most `max_points` points: the lowest and the highest of each interval, in their order.

    An interval without a drawable value is a gap: a point whose value is NaN.
    """
    total = len(series)
    if total <= max_points:
        return list(zip(series.steps, series.values, strict=True))
    points: list[Point] = []
    num_intervals = max_points // 2
    for interval in range(num_intervals):
        indices = range(interval * total // num_intervals, (interval + 1) * total // num_intervals)
        drawable = [index for index in indices if is_drawable(series.values[index])]
        if not drawable:
            points.append((series.steps[indices[0]], float("nan")))
            continue
        low, high = min(drawable, key=series.values.__getitem__), max(drawable, key=series.values.__getitem__)
        points += [(series.steps[index], series.values[index]) for index in sorted({low, high})]
    return points


def window_of(num_steps: int) -> int:
    """Return the number of steps to average: an odd number, about a fortieth of all."""
    return min(MAX_WINDOW, max(MIN_WINDOW, num_steps // 40)) | 1


def smoothed(series: Series) -> list[Point]:
    """Return moving means without outliers; empty for a series that is too short.

    At the beginning the window shrinks to what lies on both sides, so that a steep fall is not flattened.
    """
    total = len(series)
    if total < FEWEST_TO_SMOOTH:
        return []
    half = window_of(total) // 2
    indices = (
        range(total)
        if total <= SMOOTH_POINTS
        else [point * (total - 1) // (SMOOTH_POINTS - 1) for point in range(SMOOTH_POINTS)]
    )
    points: list[Point] = []
    for index in indices:
        reach = min(half, index)
        window = sorted(filter(is_drawable, series.values[index - reach : index + reach + 1]))
        num_trimmed = int(len(window) * OUTLIERS)
        averaged = window[num_trimmed : len(window) - num_trimmed]
        points.append((series.steps[index], sum(averaged) / len(averaged) if averaged else float("nan")))
    return points
