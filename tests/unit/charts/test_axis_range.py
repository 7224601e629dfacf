"""Axes: the values they contain, and their round ticks."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.charts.axis_range import AxisRange, spanning


def labels(axis: AxisRange, most: int = 6) -> list[str]:
    return [label for _, label in axis.ticks(most)]


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0, 1, 6, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.83, 3.5, 6, ["1.0", "1.5", "2.0", "2.5", "3.0", "3.5"]),
        (0, 100_000, 5, ["0", "50,000", "100,000"]),
        (1, 20, 5, ["5", "10", "15", "20"]),
        (0, 2.1e-4, 5, ["0", "5e-5", "1.0e-4", "1.5e-4", "2.0e-4"]),
        (-2.5, 2.5, 5, ["-2", "-1", "0", "1", "2"]),
        (0, 3e9, 4, ["0", "1e9", "2e9", "3e9"]),
    ],
)
def test_ticks_are_round_values_with_the_necessary_decimals(
    low: float, high: float, most: int, expected: list[str]
) -> None:
    assert labels(AxisRange(low=low, high=high), most) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.1, 30, ["0.1", "1", "10"]),
        (0.3, 4, ["0.5", "1", "2"]),
        (1e-9, 1e9, ["1e-8", "1e-4", "1e0", "1e4", "1e8"]),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_decades_or_fractions_of_them(
    low: float, high: float, expected: list[str]
) -> None:
    assert labels(AxisRange(low=low, high=high, is_log=True), 5) == expected


@given(
    st.lists(st.floats(min_value=-1e99, max_value=1e99), max_size=20),
    st.integers(2, 9),
    st.booleans(),
)
def test_any_values_have_an_axis_that_contains_them_and_ordered_ticks(
    values: list[float], most: int, from_zero: bool
) -> None:
    axis = spanning(values, from_zero=from_zero)
    assert all(map(axis.contains, values))
    ticks = axis.ticks(most)
    assert 1 <= len(ticks) <= most
    assert all(left < right for (left, _), (right, _) in pairwise(ticks))
    assert len({label for _, label in ticks}) == len(ticks)
    assert all(axis.contains(value) for value, _ in ticks)


@given(st.lists(st.floats(min_value=1e-99, max_value=1e99), min_size=1, max_size=20), st.integers(2, 9))
def test_any_positive_values_have_a_logarithmic_axis(values: list[float], most: int) -> None:
    axis = spanning(values, is_log=True)
    assert all(axis.low <= value * (1 + 1e-9) and value * (1 - 1e-9) <= axis.high for value in values)
    ticks = axis.ticks(most)
    assert len(ticks) <= most
    assert len({label for _, label in ticks}) == len(ticks)
    assert all(len(label) <= 10 for _, label in ticks)


@given(st.integers(0, 2**40), st.integers(1, 2**40), st.integers(2, 9))
def test_ticks_of_steps_are_whole(first: int, num_steps: int, most: int) -> None:
    axis = AxisRange(low=first - 0.5, high=first + num_steps + 0.5)
    ticks = axis.ticks(most, is_whole=True)
    assert [label for _, label in ticks] == [f"{round(value):,}" for value, _ in ticks]
    assert all(value == round(value) for value, _ in ticks)


def test_a_share_of_an_axis_is_a_value() -> None:
    assert [AxisRange(low=2, high=4).at(share) for share in (0, 0.5, 1)] == [2, 3, 4]
    log = AxisRange(low=1, high=100, is_log=True)
    assert [log.at(share) for share in (0, 0.5, 1)] == pytest.approx([1, 10, 100])
