"""The range of an axis, and its ticks at round values."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

SMALLEST = 1e-100
EQUAL = 1e-9  # relative difference below which values count as equal
STEPS = (1, 2, 5, 10)  # distances between ticks, to be multiplied by a power of ten
SMALLEST_DECIMAL = 1e-3  # smaller ones are written with an exponent: 2e-4
LARGEST_DECIMAL = 1e7
LARGEST_EXPONENT = math.log10(sys.float_info.max)


@dataclass(frozen=True, kw_only=True)
class AxisRange:
    """A range from `low` to `high`, which differ; both are positive if it is logarithmic."""

    low: float
    high: float
    is_log: bool = False

    def contains(self, value: float) -> bool:
        """Return whether `value` is a number in the range."""
        return self.low <= value <= self.high

    def at(self, share: float) -> float:
        """Return the value at a share of the axis: 0 is its low end, 1 its high one; at most the largest float."""
        if self.is_log:
            low, high = math.log10(self.low), math.log10(self.high)
            exponent = low + share * (high - low)
            return float(10**exponent) if exponent < LARGEST_EXPONENT else sys.float_info.max
        return self.low + share * (self.high - self.low)

    def ticks(self, max_ticks: int, *, is_whole: bool = False) -> list[tuple[float, str]]:
        """Return up to `max_ticks` round values and their labels, lowest first; only integers if `is_whole`."""
        values = self._round_values(max_ticks, is_whole=is_whole)
        largest = max(map(abs, values), default=1.0)
        smallest = min(values, default=1.0) if self.is_log else largest  # linear axes have the decimals of the step
        has_exponent = not SMALLEST_DECIMAL <= smallest <= largest < LARGEST_DECIMAL and not is_whole
        between = min((after - value for value, after in pairwise(values)), default=largest or 1.0)
        labels = [tick_label(value, between, has_exponent=has_exponent) for value in values]
        if self.is_log:  # each with as many decimals as it needs, unless labels would be equal
            shortest = [tick_label(value, value, has_exponent=has_exponent) for value in values]
            labels = shortest if len(set(shortest)) == len(shortest) else labels
        return list(zip(values, labels, strict=True))

    def _round_values(self, max_ticks: int, *, is_whole: bool) -> list[float]:
        from matplotlib.ticker import LogLocator, MaxNLocator

        ticks: list[float] = []
        if self.is_log:
            for subs in ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
                ticks = self._within(LogLocator(subs=subs).tick_values(self.low, self.high))
                if 2 <= len(ticks) <= max_ticks:
                    return ticks
            every = math.ceil(len(ticks) / max_ticks)
            return ticks[:: max(every, 1)]
        for bins in range(max_ticks, 0, -1):
            locator = MaxNLocator(bins, steps=STEPS, integer=is_whole, min_n_ticks=1)
            if len(ticks := self._within(locator.tick_values(self.low, self.high))) <= max_ticks:
                return ticks
        return ticks

    def _within(self, values: Sequence[float]) -> list[float]:
        return [float(value) for value in values if self.contains(value)]


def tick_label(value: float, step: float, *, has_exponent: bool = False) -> str:
    """Return a value with as many decimals as the first digit of `step`, which is above zero, needs."""
    if value == 0 or abs(value) < step / 1e6:
        return "0"
    decade = math.floor(math.log10(step) + 1e-9)
    if has_exponent:
        digits = max(0, math.floor(math.log10(abs(value)) + 1e-9) - decade)
        mantissa, exponent = f"{value:.{digits}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.{max(0, -decade)}f}"


def spanning(
    values: Sequence[float], *, from_zero: bool = False, is_log: bool = False, margin: float = 0.05
) -> AxisRange:
    """Return a range that contains `values`, which are drawable, with a margin at both ends."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if is_log:
        factor = (high / low) ** margin if high > low else 2.0
        return AxisRange(low=low / factor, high=high * factor, is_log=True)
    if from_zero:
        low = min(low, 0.0)
    size = max(abs(low), abs(high))
    space = (high - low) * margin if high - low > EQUAL * size else 0.1 * size
    space = space if space > SMALLEST else 1.0
    return AxisRange(low=low if from_zero and low == 0 else low - space, high=high + space)
