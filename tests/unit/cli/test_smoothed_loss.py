"""The loss shown during a run is smooth, and its arrow says what the loss does, not what its noise does."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from qlora_cli.cli.progress.smoothed_loss import EARLIER, LAST, ExponentialMean, SmoothedLoss

NUM_STEPS = 600


def arrows(loss_at: Callable[[int], float], noise: float, seed: int) -> list[str]:
    draw, shown = np.random.default_rng(seed), SmoothedLoss()
    found = []
    for step in range(NUM_STEPS):
        shown.add(loss_at(step) + float(draw.normal(0, noise)))
        found.append(shown.arrow)
    return found


def num_turns(found: list[str]) -> int:
    return sum(one != other for one, other in pairwise(found))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.02, 0.1, 0.5])
def test_noise_around_a_level_loss_is_level(noise: float, seed: int) -> None:
    found = arrows(lambda _: 2.0, noise, seed)
    assert found.count("→") > 0.9 * NUM_STEPS
    assert num_turns(found) < NUM_STEPS / 50


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("slope", "wrong"), [(-0.003, "↑"), (0.003, "↓")])
def test_a_trend_keeps_its_arrow(slope: float, wrong: str, seed: int) -> None:
    found = arrows(lambda step: 3 + slope * step, 0.1, seed)[100:]
    assert found.count("↓" if slope < 0 else "↑") > 0.9 * len(found)
    assert found.count(wrong) == 0
    assert num_turns(found) < len(found) / 25


def test_a_loss_that_turns_gets_the_other_arrow() -> None:
    found = arrows(lambda step: 1 + abs(step - 300) / 100, 0.05, 0)
    assert (found[299], found[-1]) == ("↓", "↑")


def test_there_is_no_arrow_for_a_few_steps() -> None:
    assert arrows(lambda step: 4 - step / 10, 0.0, 0)[:6] == [" ", " ", " ", " ", "↓", "↓"]


def test_the_first_losses_count_fully() -> None:
    shown = SmoothedLoss()
    assert math.isnan(shown.value)
    shown.add(4.0)
    assert shown.value == pytest.approx(4.0)
    shown.add(3.0)
    assert shown.value == pytest.approx((0.9 * 4 + 3) / 1.9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(bad: float) -> None:
    with_it, without = SmoothedLoss(), SmoothedLoss()
    for loss in (4.0, 3.5, bad, 3.0, 2.5, 2.0, 1.5):
        with_it.add(loss)
        if loss != bad and math.isfinite(loss):
            without.add(loss)
    assert (with_it.value, with_it.arrow) == (without.value, without.arrow)
    assert with_it.arrow == "↓"


@pytest.mark.parametrize("losses", [[1.7e308, -1.7e308] * 4, [0.0] * 8, [1.7e308] * 8])
def test_no_loss_is_too_large_or_too_small(losses: list[float]) -> None:
    shown = SmoothedLoss()
    for loss in losses:
        shown.add(loss)
    assert shown.arrow == "→"


@pytest.mark.parametrize("num_steps", [5, 12, 60, 400])
def test_the_deviation_is_that_of_independent_noise(num_steps: int) -> None:
    draw, changes = np.random.default_rng(num_steps), []
    for _ in range(1500 if num_steps < 400 else 300):
        shown, last, earlier = SmoothedLoss(), ExponentialMean(LAST), ExponentialMean(EARLIER)
        for _ in range(num_steps):
            value = float(draw.normal())
            shown.add(value)
            last.add(value)
            earlier.add(value)
        changes.append(last.value - earlier.value)
    measured = math.sqrt(sum(change * change for change in changes) / len(changes))
    assert shown.deviation == pytest.approx(measured, rel=0.1)
