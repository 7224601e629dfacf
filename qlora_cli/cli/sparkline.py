"""Sparklines: curves in a line of text, of series of any length in bounded memory."""

import math
from collections.abc import Sequence
from itertools import pairwise

BLOCKS = "▁▂▃▄▅▆▇█"
NOT_FINITE = "x"
MAX_MEANS = 512  # more than a terminal has columns; even, because pairs are averaged


def can_show_blocks(encoding: str | None) -> bool:
    """Return whether text in `encoding` can hold a sparkline."""
    try:
        BLOCKS.encode(encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def sparkline(values: Sequence[float], width: int) -> str:
    """Return `values` as at most `width` blocks, scaled from the lowest to the highest value.

    If there are more values than blocks, a block is the mean of its share. One without a finite value is `x`.
    """
    num_blocks = min(width, len(values))
    if num_blocks <= 0:
        return ""
    bounds = [block * len(values) // num_blocks for block in range(num_blocks + 1)]
    means = [_finite_mean(values[start:end]) for start, end in pairwise(bounds)]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return NOT_FINITE * num_blocks
    low, high = min(finite), max(finite)
    return "".join(_block(mean, low, high) for mean in means)


class SparklineCurve:
    """A series of any length, stored as fewer than `max_means` means of equally many values.

    A mean without finite values is NaN.
    """

    def __init__(self, max_means: int = MAX_MEANS) -> None:
        self._max_means = max_means
        self._means: list[float] = []
        self._num_per_mean = 1
        self._num_open = self._num_finite = 0  # of the mean that is not complete yet
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Add the next value."""
        self._num_open += 1
        if math.isfinite(value):
            self._num_finite += 1
            self._sum += value
        if self._num_open < self._num_per_mean:
            return
        self._means.append(self._open_mean())
        self._num_open = self._num_finite = 0
        self._sum = 0.0
        if len(self._means) == self._max_means:
            self._means = [_finite_mean(self._means[at : at + 2]) for at in range(0, self._max_means, 2)]
            self._num_per_mean *= 2

    def means(self) -> list[float]:
        """Return the means, oldest first; the last may cover fewer values."""
        return [*self._means, self._open_mean()] if self._num_open else list(self._means)

    def _open_mean(self) -> float:
        return self._sum / self._num_finite if self._num_finite else math.nan


def _finite_mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    # Divided before the summation, because the sum of two large losses could be infinite.
    return sum(value / len(finite) for value in finite) if finite else math.nan


def _block(value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return NOT_FINITE
    # Halved, so that the difference of the largest floats is not infinite either.
    share = (value / 2 - low / 2) / (high / 2 - low / 2) if high > low else 0.0
    return BLOCKS[min(int(share * len(BLOCKS)), len(BLOCKS) - 1)]
