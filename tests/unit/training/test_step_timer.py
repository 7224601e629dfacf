"""The time of a step is the median of the first ones after the first; it is compared once, and corrects later ones."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_cli.runs.run_result import PredictedTime
from qlora_cli.timing.rates_file import known_rates
from qlora_cli.timing.run_ratios import RunKey
from qlora_cli.training.callbacks.step_timer import NUM_LEARNT, Forecast, StepClock, StepTimer, TimedStep

CARD = "RTX 4090"
SECONDS = 2.2


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))


def key_of(card: str = CARD) -> RunKey:
    known = known_rates(card, card=card, num_sms=128)
    assert known is not None
    return known.key_of(card, "nf4, bf16", "device")


def forecast(seconds: float = SECONDS, *, ratio: float | None = None, card: str = CARD) -> Forecast:
    predicted = PredictedTime(
        step_seconds=seconds,
        step_seconds_low=1.7,
        step_seconds_high=2.9,
        rates="data sheet",
        learnt_ratio=ratio,
        learnt_runs=0 if ratio is None else 1,
    )
    return Forecast(predicted=predicted, key=key_of(card))


def step(seconds: float, *, core: float = 1.0, tokens: int = 100) -> TimedStep:
    return TimedStep(seconds=seconds, core_seconds=core * seconds, num_tokens=tokens)


def timed(steps: Sequence[TimedStep], predicted: Forecast | None, *, computes_here: bool = False) -> str:
    """Return what is said of steps after a first one."""
    timer = StepTimer(predicted, computes_here=computes_here)
    return "".join(filter(None, map(timer.add, (step(60.0), *steps))))


def ratios(card: str = CARD) -> list[float]:
    known = known_rates(card, card=card, num_sms=128)
    assert known is not None
    return [run.ratio for run in known.runs if run.key == key_of(card)]


def test_the_first_step_and_a_slow_one_do_not_count() -> None:
    timer = StepTimer(None, computes_here=False)
    assert timer.step_seconds is None
    timer.add(step(60.0))
    assert timer.step_seconds is None
    for seconds in (2.0, 2.0, 30.0):
        timer.add(step(seconds))
    assert timer.step_seconds == 2.0


def test_the_comparison_is_made_once_after_ten_steps_and_later_ones_change_nothing() -> None:
    timer = StepTimer(forecast(), computes_here=False)
    said = [timer.add(step(2.0)) for _ in range(3 * NUM_LEARNT)]
    expected = (
        "a step takes 2.00 s, 2.20 s predicted (+10 %, rates data sheet); later predictions here are corrected by it"
    )
    assert [comparison for comparison in said if comparison is not None] == [expected]
    assert said.index(expected) == NUM_LEARNT
    timer.add(step(50.0))
    assert timer.step_seconds == 2.0
    assert ratios() == [pytest.approx(2.0 / 2.2)]


@pytest.mark.parametrize(("predicted", "seconds"), [(None, 2.0), (SECONDS, 0.0)], ids=["none", "no-time"])
def test_nothing_is_said_without_a_prediction_or_a_duration(predicted: float | None, seconds: float) -> None:
    assert timed([step(seconds)] * NUM_LEARNT, None if predicted is None else forecast(predicted)) == ""
    assert ratios() == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(seconds=st.floats(0.5, 5.0), ratio=st.floats(0.5, 2.0), card=st.sampled_from(["L4", "T4", "A40"]))
def test_what_is_stored_is_the_ratio_to_the_prediction_without_its_correction(
    seconds: float, ratio: float, card: str
) -> None:
    timed([step(seconds)] * NUM_LEARNT, forecast(2.0 * ratio, ratio=ratio, card=card))
    assert ratios(card)[-1] == pytest.approx(seconds / 2.0)


def test_steps_next_to_other_programs_are_compared_but_correct_nothing_on_a_cpu() -> None:
    busy = [step(2.0, core=0.5)] * NUM_LEARNT
    said = timed(busy, forecast(), computes_here=True)
    assert said.endswith("are not corrected by it: other programs had the core for 50% of the time")
    assert ratios() == []
    timed(busy, forecast())  # a GPU computes while this thread waits
    assert len(ratios()) == 1


def test_steps_that_scatter_correct_nothing_unless_their_rows_do_as_much() -> None:
    lengths = [100, 200, 300, 400, 500] * (NUM_LEARNT // 5)
    said = timed([step(length / 100) for length in lengths], forecast())
    assert said.endswith("are not corrected by it: steps took 1.00 s to 5.00 s")
    assert ratios() == []
    timed([step(length / 100, tokens=length) for length in lengths], forecast())
    timed([step(2.0, tokens=length) for length in lengths], forecast())  # limited by the host
    assert len(ratios()) == 2


def test_a_cache_that_can_not_be_written_ends_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("QLORA_CACHE", str(file))
    said = timed([step(2.0)] * NUM_LEARNT, forecast())
    assert said.endswith("are not corrected by it, since the cache can't be written")


def test_a_clock_measures_one_step_after_another_and_what_this_thread_computes() -> None:
    clock = StepClock()
    time.sleep(0.05)
    slept = clock.lap(7)
    clock.lap(8)
    assert slept.num_tokens == 7
    assert slept.seconds >= 0.05
    assert slept.core_seconds < 0.5 * slept.seconds
