"""Predictions compared with public measurements of QLoRA steps on a T4, to which no constant was fitted.

The bounds are those of issue 4. The remaining error of reserved memory comes from the state of the allocator's
pool after hundreds of allocations and frees, which a replay of the same operations meets nearly, not exactly.
"""

import json
import statistics

import pytest

from benchmarks.measured_rows import ROWS, Comparison, compare

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture(scope="module")
def compared() -> list[Comparison]:
    """The predicted and measured values of every row."""
    return [compare(row) for row in json.loads(ROWS.read_text(encoding="utf-8"))]


def errors(compared: list[Comparison], figure: str) -> list[float]:
    return [abs(row.error(figure)) for row in compared]


def test_there_are_rows(compared: list[Comparison]) -> None:
    assert len(compared) == len(json.loads(ROWS.read_text(encoding="utf-8"))) >= 20


def test_allocated_memory_is_right_within_0_3_percent_on_average_and_1_at_worst(compared: list[Comparison]) -> None:
    percent = errors(compared, "allocated")
    assert statistics.mean(percent) <= 0.3
    assert max(percent) <= 1


def test_reserved_memory_is_right_within_2_5_percent_on_average_and_8_at_worst(compared: list[Comparison]) -> None:
    percent = errors(compared, "reserved")
    assert statistics.mean(percent) <= 2.5
    assert max(percent) <= 8


@pytest.mark.parametrize("phase", ["forward", "backward", "optimizer"])
def test_the_peak_of_each_phase_is_right_within_1_percent_on_average(compared: list[Comparison], phase: str) -> None:
    assert statistics.mean(errors(compared, phase)) <= 1
