"""An axis of a chart: where a value stands on it, and which round values are written beside it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

LARGEST = 1e100  # beyond, differences could overflow: drawn like what is no number
SMALLEST = 1e-100
EQUAL = 1e-9  # of their size: values that differ by less are drawn as one
MANTISSAS = (1, 2, 5)
SMALLEST_DECIMAL = 1e-3  # smaller ones are written with an exponent: 2e-4
LARGEST_DECIMAL = 1e7


@dataclass(frozen=True)
class Tick:
    """A value written beside an axis; `place` is 0 at its low end and 1 at its high one."""

    place: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Axis:
    """From `low` to `high`, which differ; both above zero if it is logarithmic."""

    low: float
    high: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return where `value` stands: from 0 to 1 within, less or more outside."""
        low, high, value = self._scaled(self.low), self._scaled(self.high), self._scaled(value)
        return (value - low) / (high - low)

    def holds(self, value: float) -> bool:
        """Whether `value` is drawable and within."""
        return self.low <= value <= self.high

    def ticks(self, most: int) -> list[Tick]:
        """Return up to `most` round values within, lowest first."""
        values = self._round_values(most)
        largest = max(map(abs, values), default=1.0)
        has_exponent = not SMALLEST_DECIMAL <= largest < LARGEST_DECIMAL
        between = min((after - value for value, after in pairwise(values)), default=largest)
        return [
            Tick(self.place(value), tick_label(value, value if self.is_log else between, has_exponent=has_exponent))
            for value in values
        ]

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.is_log else value

    def _round_values(self, most: int) -> list[float]:
        if not self.is_log:
            steps = _round_steps((self.high - self.low) / most)
            return next(found for step in steps if len(found := _multiples(step, self.low, self.high)) <= most)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for mantissas, every in ((MANTISSAS, 1), ((1, 3), 1), *(((1,), every) for every in range(1, 100))):
            decades = range(first, last + 1, every)
            values = [mantissa * 10.0**decade for decade in decades for mantissa in mantissas]
            if len(values := [value for value in values if self.holds(value)]) <= most:
                return values
        return []


def _round_steps(least: float) -> Iterator[float]:
    """Yield 1, 2 and 5 times powers of ten, from about `least` on."""
    decade = math.floor(math.log10(least))
    while True:
        yield from (mantissa * 10.0**decade for mantissa in MANTISSAS if mantissa * 10.0**decade >= least * 0.999)
        decade += 1


def _multiples(step: float, low: float, high: float) -> list[float]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_label(value: float, step: float, *, has_exponent: bool = False) -> str:
    """Return a value with the decimals that `step`, which is above zero, has in its first digit."""
    if value == 0 or abs(value) < step / 1e6:
        return "0"
    decade = math.floor(math.log10(step) + 1e-9)
    if has_exponent:
        digits = max(0, math.floor(math.log10(abs(value)) + 1e-9) - decade)
        mantissa, exponent = f"{value:.{digits}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.{max(0, -decade)}f}"


def spanning(values: list[float], *, from_zero: bool = False, is_log: bool = False, margin: float = 0.05) -> Axis:
    """Return an axis that holds `values`, which are drawable, with room at its ends."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if is_log:
        room = (high / low) ** margin if high > low else 2.0
        return Axis(low=low / room, high=high * room, is_log=True)
    if from_zero:
        low = min(low, 0.0)
    size = max(abs(low), abs(high))
    room = (high - low) * margin if high - low > EQUAL * size else 0.1 * size
    room = room if room > SMALLEST else 1.0
    return Axis(low=low if from_zero and low == 0 else low - room, high=high + room)


def is_drawable(value: float) -> bool:
    """Whether a value is a number, and not so large that it breaks an axis."""
    return -LARGEST < value < LARGEST
