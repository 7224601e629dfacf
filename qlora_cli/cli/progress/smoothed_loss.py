"""The loss as a display shows it: smoothed, with an arrow that does not follow noise."""

import math
from collections import deque

LAST, EARLIER = 0.9, 0.98  # what an exponential mean keeps at a step: those of about ten and of fifty steps
CLEAR = 3.0  # standard deviations from which on an arrow is shown; it then stays until the loss is level or turns
LEVEL = 0.002  # relative change below which the loss counts as level, whatever the noise
LEAST_STEPS = 5  # before there is an arrow


class ExponentialMean:
    """An exponential mean that weighs its first values right, as Adam's moments do."""

    def __init__(self, kept: float) -> None:
        self.kept = kept
        self.weight = self._sum = 0.0

    def add(self, value: float) -> None:
        """Add the next value."""
        self._sum = self.kept * self._sum + (1 - self.kept) * value
        self.weight = self.kept * self.weight + (1 - self.kept)

    @property
    def value(self) -> float:
        """The mean; NaN of nothing."""
        return self._sum / self.weight if self.weight else math.nan


class WeightProduct:
    """The sum of the products of the weights that two exponential means give each value."""

    def __init__(self, one: ExponentialMean, other: ExponentialMean) -> None:
        self._one, self._other = one, other
        self._sum = 0.0

    def add(self) -> None:
        """Follow the means, which have got another value."""
        one, other = self._one, self._other
        self._sum = one.kept * other.kept * self._sum + (1 - one.kept) * (1 - other.kept)

    @property
    def value(self) -> float:
        """The sum, which is the covariance of both means of independent values of variance 1."""
        return self._sum / (self._one.weight * self._other.weight)


class SmoothedLoss:
    """The mean loss of the last steps, and whether it is below or above that of earlier ones by more than the noise.

    The noise is estimated from the second differences of successive steps, to which a steady trend adds nothing.
    """

    def __init__(self) -> None:
        last, earlier = self._last, self._earlier = ExponentialMean(LAST), ExponentialMean(EARLIER)
        self._products = (WeightProduct(last, last), WeightProduct(earlier, earlier), WeightProduct(last, earlier))
        self._squares = ExponentialMean(EARLIER)  # of the second differences, 6 times the variance
        self._recent = deque[float](maxlen=3)
        self._num_steps = 0
        self.arrow = " "

    @property
    def value(self) -> float:
        """The mean of the last steps; NaN before the first one."""
        return self._last.value

    @property
    def deviation(self) -> float:
        """The standard deviation of the difference of both means for noise of standard deviation 1."""
        last, earlier, both = (product.value for product in self._products)
        return math.sqrt(max(0.0, last + earlier - 2 * both))

    def add(self, loss: float) -> None:
        """Add the loss of a step; one that is not finite changes nothing."""
        if not math.isfinite(loss):
            return
        self._num_steps += 1
        self._last.add(loss)
        self._earlier.add(loss)
        for product in self._products:
            product.add()
        self._recent.append(loss)
        if len(self._recent) == 3:
            first, second, third = (value / 4 for value in self._recent)  # so that no difference is infinite
            self._squares.add(16 * (first - 2 * second + third) * (first - 2 * second + third))
        if self._num_steps >= LEAST_STEPS:
            self.arrow = self._direction()

    def _direction(self) -> str:
        """Return an arrow: the present one while the loss goes on so, a new one once a change is clear."""
        change = self._last.value - self._earlier.value
        towards = "↓" if change < 0 else "↑"
        noise = math.sqrt(self._squares.value / 6)
        needed = 0.0 if self.arrow == towards else CLEAR * noise * self.deviation
        return towards if abs(change) > max(needed, LEVEL * abs(self._earlier.value)) else "→"
