"""The time of a step is the median of the first ones after the first, and is compared with its prediction once."""

import pytest

from qlora_cli.runs.run_result import PredictedTime
from qlora_cli.training.callbacks.step_timer import NUM_LEARNT, StepTimer

PREDICTED = PredictedTime(step_seconds=2.2, step_seconds_low=1.7, step_seconds_high=2.9, rates="data sheet")


def test_the_first_step_and_a_slow_one_do_not_count() -> None:
    timer = StepTimer(None)
    assert timer.step_seconds is None
    timer.add(60.0)
    assert timer.step_seconds is None
    for seconds in (2.0, 2.0, 30.0):
        timer.add(seconds)
    assert timer.step_seconds == 2.0


def test_the_comparison_is_made_once_after_ten_steps_and_later_ones_change_nothing() -> None:
    timer = StepTimer(PREDICTED)
    said = [timer.add(2.0) for _ in range(3 * NUM_LEARNT)]
    expected = "a step takes 2.00 s, 2.20 s predicted (+10 %, rates data sheet)"
    assert [comparison for comparison in said if comparison is not None] == [expected]
    assert said.index(expected) == NUM_LEARNT
    timer.add(50.0)
    assert timer.step_seconds == 2.0


@pytest.mark.parametrize(("predicted", "seconds"), [(None, 2.0), (PREDICTED, 0.0)], ids=["none", "no-time"])
def test_nothing_is_said_without_a_prediction_or_a_duration(predicted: PredictedTime | None, seconds: float) -> None:
    timer = StepTimer(predicted)
    assert [timer.add(seconds) for _ in range(2 * NUM_LEARNT)] == 2 * NUM_LEARNT * [None]
