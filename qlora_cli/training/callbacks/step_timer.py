"""The time of a step, as the first ones after a run's start tell: next to its prediction, and for later ones."""

import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from qlora_cli.runs.run_result import PredictedTime
from qlora_cli.timing.rates_file import store_run
from qlora_cli.timing.run_ratios import RunKey, described
from qlora_cli.units import format_duration

NUM_LEARNT = 10  # steps, after a first one that also allocates and compiles
# Of the time of a step on a CPU, that in which its own thread must have a core, else other programs are measured, too.
LEAST_CORE_SHARE = 0.85
MOST_SCATTER = 0.25  # between the quartiles of the durations, as a share of their median


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is predicted for the steps of a run, and what their ratio to it is stored under."""

    predicted: PredictedTime
    key: RunKey


@dataclass(frozen=True, kw_only=True)
class TimedStep:
    """A step: its seconds, and those in which its own thread had a core; its tokens without padding."""

    seconds: float
    core_seconds: float
    num_tokens: int


class StepClock:
    """Measures steps one after another, as seconds and as those in which this thread had a core."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start to measure a step now."""
        self._start, self._core_start = time.monotonic(), time.thread_time()

    def lap(self, num_tokens: int) -> TimedStep:
        """Return the step that ends now, and start the next one."""
        start, core_start = self._start, self._core_start
        self.restart()
        return TimedStep(
            seconds=self._start - start, core_seconds=self._core_start - core_start, num_tokens=num_tokens
        )


class StepTimer:
    """Learns the seconds of a step; `forecast` is what they are compared with.

    `computes_here`: on a CPU, where the thread of the steps computes instead of waiting for a GPU.
    """

    def __init__(self, forecast: Forecast | None, *, computes_here: bool) -> None:
        self._forecast = forecast
        self._computes_here = computes_here
        self._steps: list[TimedStep] = []
        self._is_first = True

    def add(self, step: TimedStep) -> str | None:
        """Take a step; once enough are known, return the comparison as a sentence, and store it for predictions."""
        if self._is_first:
            self._is_first = False
            return None
        if len(self._steps) == NUM_LEARNT:
            return None
        self._steps.append(step)
        return self._compare() if len(self._steps) == NUM_LEARNT else None

    @property
    def step_seconds(self) -> float | None:
        """The median of the steps that were taken; None if there are none yet."""
        return statistics.median(step.seconds for step in self._steps) if self._steps else None

    def _compare(self) -> str | None:
        measured, forecast = self.step_seconds, self._forecast
        if forecast is None or not measured:
            return None
        predicted = forecast.predicted
        error = 100 * (predicted.step_seconds / measured - 1)
        rates = described(predicted.rates, predicted.learnt_ratio, predicted.learnt_runs)
        return (
            f"a step takes {format_duration(measured)}, {format_duration(predicted.step_seconds)} predicted "
            f"({error:+.0f} %, rates {rates}); {self._learn(forecast, measured)}"
        )

    def _learn(self, forecast: Forecast, measured: float) -> str:
        """Store the ratio of the steps to their prediction, and say so."""
        if disturbance := self._disturbance():
            return f"later predictions are not corrected by it: {disturbance}"
        with suppress(OSError):  # a full or read-only disk costs the correction only
            store_run(forecast.key, forecast.predicted.ratio_of(measured))
            return "later predictions here are corrected by it"
        return "later predictions are not corrected by it, since the cache can't be written"

    def _disturbance(self) -> str:
        """Return why the steps say little about others on this machine; empty if they do not."""
        core_share = sum(step.core_seconds for step in self._steps) / sum(step.seconds for step in self._steps)
        if self._computes_here and core_share < LEAST_CORE_SHARE:
            return f"other programs had the core for {1 - core_share:.0%} of the time"
        durations = [step.seconds for step in self._steps]
        # Where rows differ, so do steps, and those that the GPU limits in proportion to their tokens.
        of_a_token = [step.seconds / max(step.num_tokens, 1) for step in self._steps]
        if min(_scatter(durations), _scatter(of_a_token)) > MOST_SCATTER:
            return f"steps took {format_duration(min(durations))} to {format_duration(max(durations))}"
        return ""


def _scatter(values: Sequence[float]) -> float:
    """Return the distance of the quartiles as a share of the median."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle
