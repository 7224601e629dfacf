"""A curve in one line of text, and the means that are stored of a long one."""

import math
import statistics

import pytest

from qlora_cli.cli.progress.event_text import describe_losses
from qlora_cli.cli.sparkline import BLOCKS, SparklineCurve, can_show_blocks, sparkline

NAN, INF = math.nan, math.inf
LARGEST = 1.7e308


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], 8, BLOCKS),
        ([8, 1], 80, "█▁"),  # never stretched
        ([1, 1, 8, 8], 2, "▁█"),
        ([1, 2, 8, 8, 1, 1], 3, "▁█▁"),
        ([3, 3, 3], 9, "▁▁▁"),
        ([5], 9, "▁"),
        ([], 9, ""),
        ([1, 2], 0, ""),
        ([1, 2], -3, ""),
        ([1, NAN, 8, INF, -INF], 5, "▁x█xx"),
        ([1, NAN, INF, 8], 2, "▁█"),  # a share with a finite value has a mean
        ([NAN, INF], 5, "xx"),
        ([-LARGEST, LARGEST, LARGEST, LARGEST], 2, "▁█"),  # neither the sum nor the range is a float
        ([-LARGEST, LARGEST], 2, "▁█"),
    ],
)
def test_values_are_drawn_between_their_bounds(values: list[float], width: int, drawn: str) -> None:
    assert sparkline(values, width) == drawn


@pytest.mark.parametrize("num_values", [1, 79, 80, 81, 159, 1000])
def test_a_curve_is_as_wide_as_requested_unless_it_is_shorter(num_values: int) -> None:
    assert len(sparkline([float(value) for value in range(num_values)], 80)) == min(80, num_values)


def test_losses_are_drawn_with_their_range_in_the_given_width() -> None:
    losses = [5.0 - value / 100 for value in range(400)]
    for width in (30, 40, 120):
        line = describe_losses(losses, width)
        assert line is not None
        assert len(line) == width
        assert line.startswith("losses █")
        assert line.endswith("▁  1.01 to 5")
    assert describe_losses([1.0], 40) is None
    assert describe_losses([1.0, NAN], 40) is None
    assert describe_losses([1.0, NAN, 2.0], 40) == "losses ▁x█  1 to 2"


def test_a_curve_of_any_length_is_stored_in_few_means() -> None:
    curve, most_means = SparklineCurve(8), 0
    for value in range(10_000):
        curve.add(float(value))
        most_means = max(most_means, len(curve.means()))
    assert most_means == 8
    means = curve.means()
    assert means == sorted(means)
    assert means[0] == statistics.fmean(range(2048))
    assert means[-1] == statistics.fmean(range(4 * 2048, 10_000))  # the values of the incomplete last mean
    million = SparklineCurve()
    for _ in range(1_000_000):
        million.add(1.0)
    assert 256 <= len(million.means()) <= 512


def test_a_short_curve_is_stored_unchanged() -> None:
    curve = SparklineCurve()
    assert curve.means() == []
    for value in (3.0, 2.0, 1.0):
        curve.add(value)
    assert curve.means() == [3.0, 2.0, 1.0]


def test_values_that_are_not_finite_are_gaps_unless_averaged_with_finite_ones() -> None:
    curve = SparklineCurve(4)
    for value in (NAN, INF, 1.0, NAN, 5.0, 7.0):
        curve.add(value)
    first, *rest = curve.means()
    assert math.isnan(first)
    assert rest == [1.0, 6.0]
    curve.add(NAN)
    assert math.isnan(curve.means()[-1])


def test_blocks_are_shown_only_in_encodings_that_have_them() -> None:
    assert can_show_blocks("utf-8")
    assert can_show_blocks("UTF8")
    assert can_show_blocks(None)  # as of a buffer
    for encoding in ("ascii", "latin-1", "cp1252", "no such encoding"):
        assert not can_show_blocks(encoding)
