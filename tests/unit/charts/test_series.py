"""Series shortened for drawing: spikes survive, means omit outliers, gaps remain."""

import math
import random

import pytest

from qlora_cli.charts.series import MAX_POINTS, Series, smoothed, thinned, window_of

NAN = float("nan")


def test_thinning_leaves_every_spike_and_at_most_a_thousand_points() -> None:
    values = [1.0] * 200_000
    values[77_777], values[123_456] = 900.0, -5.0
    points = thinned(Series(range(200_000), values))
    assert len(points) <= MAX_POINTS
    assert (77_777, 900.0) in points
    assert (123_456, -5.0) in points
    assert [step for step, _ in points] == sorted(step for step, _ in points)


def test_a_short_series_is_unchanged_and_a_range_without_numbers_is_a_gap() -> None:
    short = Series([1, 2, 3], [1.0, NAN, 3.0])
    assert [step for step, _ in thinned(short)] == [1, 2, 3]
    long = Series(range(10_000), [1.0] * 4000 + [NAN] * 2000 + [2.0] * 4000)
    gaps = [step for step, value in thinned(long) if math.isnan(value)]
    assert gaps
    assert all(4000 <= step < 6000 for step in gaps)


def test_smoothing_omits_outliers_and_does_not_flatten_the_beginning() -> None:
    random.seed(0)
    falling = [1 + 4 * math.exp(-step / 50) + random.gauss(0, 0.01) for step in range(2000)]
    with_spike = [*falling]
    with_spike[1000] = 1e6
    with_spike[1500] = NAN
    means = smoothed(Series(range(2000), with_spike))
    assert means[0][1] == falling[0]
    # Compared with the noiseless curve, whose mean within a window equals the value at its middle.
    assert all(abs(value - (1 + 4 * math.exp(-step / 50))) < 0.12 for step, value in means)
    assert smoothed(Series([1, 2], [1.0, 2.0])) == []


@pytest.mark.parametrize(("num_steps", "expected"), [(10, 5), (2000, 51), (10**6, 2001)])
def test_windows_grow_with_the_run_and_are_odd(num_steps: int, expected: int) -> None:
    assert window_of(num_steps) == expected
