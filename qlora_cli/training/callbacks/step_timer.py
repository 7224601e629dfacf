"""The time of a step, as the first ones after a run's start tell, next to its prediction."""

import statistics

from qlora_cli.runs.run_result import PredictedTime
from qlora_cli.units import format_duration

NUM_LEARNT = 10  # steps, after a first one that also allocates and compiles


class StepTimer:
    """Learns the seconds of a step; `predicted` is what they are compared with."""

    def __init__(self, predicted: PredictedTime | None) -> None:
        self._predicted = predicted
        self._durations: list[float] = []
        self._is_first = True

    def add(self, seconds: float) -> str | None:
        """Take the duration of a step; return the comparison as a sentence, once, when enough are known."""
        if self._is_first:
            self._is_first = False
            return None
        if len(self._durations) == NUM_LEARNT:
            return None
        self._durations.append(seconds)
        return self._comparison() if len(self._durations) == NUM_LEARNT else None

    @property
    def step_seconds(self) -> float | None:
        """The median of the steps that were taken; None if there are none yet."""
        return statistics.median(self._durations) if self._durations else None

    def _comparison(self) -> str | None:
        measured = self.step_seconds
        if self._predicted is None or not measured:
            return None
        predicted = self._predicted.step_seconds
        error = 100 * (predicted / measured - 1)
        return (
            f"a step takes {format_duration(measured)}, {format_duration(predicted)} predicted ({error:+.0f} %, rates "
            f"{self._predicted.rates})"
        )
