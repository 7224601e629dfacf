"""The charts of a run: round ticks, spikes that survive, gaps, and curves that stand where they should."""

import math
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.events import CheckpointSaved, Event, StepSkipped, TrainingResumed
from qlora_cli.runs.find_runs import read_run
from qlora_cli.runs.report.axis import Axis, spanning
from qlora_cli.runs.report.charts import charts_of
from qlora_cli.runs.report.curve import (
    HEIGHT,
    MOST_POINTS,
    WIDTH,
    Series,
    drawn,
    path_of,
    smoothed,
    thinned,
    window_of,
)
from qlora_cli.runs.report.drawing import MOST_BANDS, MOST_MARKS, Chart
from tests.support.run_directories import a_record, eval_done, step_done, write_run

NAN, INF = float("nan"), float("inf")


def labels(axis: Axis, most: int = 6) -> list[str]:
    return [tick.label for tick in axis.ticks(most)]


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0, 1, 6, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.83, 3.5, 6, ["1.0", "1.5", "2.0", "2.5", "3.0", "3.5"]),
        (0, 100_000, 5, ["0", "50,000", "100,000"]),
        (1, 20, 5, ["5", "10", "15", "20"]),
        (0, 2.1e-4, 5, ["0", "5e-5", "1.0e-4", "1.5e-4", "2.0e-4"]),
        (-2.5, 2.5, 5, ["-2", "-1", "0", "1", "2"]),
        (0, 3e9, 4, ["0", "1e9", "2e9", "3e9"]),
    ],
)
def test_ticks_are_round_values_with_as_many_decimals_as_they_need(
    low: float, high: float, most: int, expected: list[str]
) -> None:
    shown = labels(Axis(low=low, high=high), most)
    assert shown[0].replace("0.0", "0") == expected[0].replace("0.0", "0")
    assert shown[1:] == expected[1:]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.1, 30, ["0.1", "1", "10"]),
        (0.3, 4, ["0.5", "1", "2"]),
        (1e-9, 1e9, ["1e-9", "1e-5", "1e-1", "1e3", "1e7"]),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_decades_or_parts_of_them(
    low: float, high: float, expected: list[str]
) -> None:
    assert labels(Axis(low=low, high=high, is_log=True), 5) == expected


@given(
    st.lists(st.floats(min_value=-1e99, max_value=1e99), max_size=20),
    st.integers(2, 9),
    st.booleans(),
)
def test_any_values_have_an_axis_that_holds_them_and_ordered_ticks(
    values: list[float], most: int, from_zero: bool
) -> None:
    axis = spanning(values, from_zero=from_zero)
    assert all(0 <= axis.place(value) <= 1 for value in values)
    ticks = axis.ticks(most)
    assert len(ticks) <= most
    assert all(left.place < right.place for left, right in pairwise(ticks))
    assert len({tick.label for tick in ticks}) == len(ticks)
    assert all(-1e-6 <= tick.place <= 1 + 1e-6 for tick in ticks)


@given(st.lists(st.floats(min_value=1e-99, max_value=1e99), min_size=1, max_size=20), st.integers(2, 9))
def test_any_positive_values_have_a_logarithmic_axis(values: list[float], most: int) -> None:
    axis = spanning(values, is_log=True)
    assert all(-1e-6 <= axis.place(value) <= 1 + 1e-6 for value in values)
    assert len(axis.ticks(most)) <= most


def test_thinning_keeps_every_spike_and_at_most_a_thousand_points() -> None:
    values = [1.0] * 200_000
    values[77_777], values[123_456] = 900.0, -5.0
    points = thinned(Series(range(200_000), values))
    assert len(points) <= MOST_POINTS
    assert (77_777, 900.0) in points
    assert (123_456, -5.0) in points
    assert [step for step, _ in points] == sorted(step for step, _ in points)


def test_a_short_series_is_left_as_it_is_and_a_stretch_without_numbers_is_a_gap() -> None:
    short = Series([1, 2, 3], [1.0, NAN, 3.0])
    assert [step for step, _ in thinned(short)] == [1, 2, 3]
    long = Series(range(10_000), [1.0] * 4000 + [NAN] * 2000 + [2.0] * 4000)
    gaps = [step for step, value in thinned(long) if math.isnan(value)]
    assert gaps
    assert all(4000 <= step < 6000 for step in gaps)


def test_smoothing_leaves_outliers_out_and_does_not_flatten_the_beginning() -> None:
    random.seed(0)
    falling = [1 + 4 * math.exp(-step / 50) + random.gauss(0, 0.01) for step in range(2000)]
    with_spike = [*falling]
    with_spike[1000] = 1e6
    with_spike[1500] = NAN
    means = smoothed(Series(range(2000), with_spike))
    assert means[0][1] == falling[0]
    # Against the noiseless curve, the mean within a window of which has the height of its middle.
    assert all(abs(value - (1 + 4 * math.exp(-step / 50))) < 0.12 for step, value in means)
    assert smoothed(Series([1, 2], [1.0, 2.0])) == []


@pytest.mark.parametrize(("num_steps", "expected"), [(10, 5), (2000, 51), (10**6, 2001)])
def test_windows_grow_with_the_run_and_are_odd(num_steps: int, expected: int) -> None:
    assert window_of(num_steps) == expected


def test_a_path_breaks_at_what_is_no_number_and_stays_near_the_drawing() -> None:
    across, up = Axis(low=0, high=4), Axis(low=0, high=1)
    path = path_of([(0, 0.0), (1, 1.0), (2, NAN), (3, 0.5), (4, INF), (4, 1e50)], across, up)
    assert path == f"M0 {HEIGHT}h.01L500 0M1500 500h.01M2000 {-HEIGHT}h.01"
    assert drawn(2, 0.25, across, up) == (WIDTH // 2, 750)


def charts(folder: Path, events: list[Event], record: dict[str, object] | None = None) -> dict[str, Chart]:
    run = read_run(write_run(folder, events, record))
    return {chart.labels.name: chart for chart in charts_of(run.history, run.summary, run.record)}


def curve_of(chart: Chart, kind: str) -> list[tuple[int, int]]:
    (path,) = [curve.path for curve in chart.curves if curve.kind == kind]
    return [(int(x), int(y)) for x, y in re.findall(r"[ML](-?\d+) (-?\d+)", path)]


def test_a_run_has_a_chart_for_each_figure_with_its_unit(tmp_path: Path) -> None:
    found = charts(tmp_path, [step_done(step) for step in range(1, 101)], a_record())
    units = {name: chart.labels.unit for name, chart in found.items()}
    assert units == {
        "loss": "nats a token",
        "learning_rate": "",
        "grad_norm": "",
        "tokens_per_second": "tokens a second",
        "memory": "GiB",
    }
    for chart in found.values():
        assert 3 <= len(chart.y_ticks) <= 8
        assert [tick.label for tick in chart.x_ticks] == ["0", "50", "100"]
        assert len(chart.bands) == 100
        assert chart.bands[6].title.startswith("step 7\n")
        assert chart.labels.description


def test_the_loss_falls_in_the_drawing_and_the_best_evaluation_is_marked(tmp_path: Path) -> None:
    events: list[Event] = []
    for step in range(1, 101):
        events += [step_done(step), *([eval_done(step, 1.5 + abs(step - 60) / 100)] if step % 20 == 0 else [])]
    loss = charts(tmp_path, events)["loss"]
    raw, mean, held = (curve_of(loss, kind) for kind in ("raw", "first", "second"))
    assert len(raw) == 100
    assert all(left[0] < right[0] and left[1] <= right[1] for left, right in pairwise(raw))
    assert len(mean) == 100
    assert len(held) == 5
    (best,) = [mark for mark in loss.marks if mark.kind == "best"]
    assert (best.x, best.y) == held[2]
    assert best.title == "step 60: held-out 1.5000, the best"
    assert "best: 1.5000 at step 60" in {key.label for key in loss.labels.keys}


def test_events_are_marked_with_their_steps(tmp_path: Path) -> None:
    events: list[Event] = [step_done(step) for step in range(1, 41)]
    events += [StepSkipped(step=30, reason="nan", rows=()), CheckpointSaved(step=20, path=Path("c"))]
    events += [TrainingResumed(step=40, num_steps=100, checkpoint=Path("c"))]
    events += [step_done(step) for step in range(41, 81)]
    found = charts(tmp_path, events)
    kinds = {mark.kind: mark for mark in found["loss"].marks}
    assert kinds["skipped"].title == "step 30: skipped: not finite"
    assert kinds["saved"].x == curve_of(found["loss"], "raw")[19][0]
    for chart in found.values():
        (rule,) = [rule for rule in chart.rules if rule.kind == "resumed"]
        assert rule.title == "resumed after step 40"
        assert not rule.is_level


def test_a_single_spike_neither_flattens_the_loss_nor_is_hidden(tmp_path: Path) -> None:
    losses = {50: 1e6, 60: NAN, 61: INF, 70: -INF}
    events: list[Event] = [step_done(step, loss=losses.get(step, step_done(step).loss)) for step in range(1, 301)]
    loss = charts(tmp_path, events)["loss"]
    heights = [y for _, y in curve_of(loss, "first")]
    assert max(heights) - min(heights) > HEIGHT / 2
    beyond = [mark for mark in loss.marks if mark.kind == "beyond"]
    assert [mark.title for mark in beyond] == [
        "step 50: loss 1e+06",
        "step 60: loss nan",
        "step 61: loss inf",
        "step 70: loss -inf",
    ]
    assert loss.labels.remark == (
        "1 step outside of the chart, up to 1e+06; 3 steps with a loss that is no finite number"
    )
    assert "nan" not in "".join(curve.path for curve in loss.curves)


def test_gradient_norms_are_logarithmic_only_where_they_are_wide_and_above_zero(tmp_path: Path) -> None:
    for name, spike, unit in (("wide", 50.0, "logarithmic"), ("narrow", 1.0, ""), ("zero", 0.0, "")):
        norms = {9: spike, 10: 60.0 if name == "zero" else 0.3}
        events: list[Event] = [
            step_done(step, grad_norm=norms.get(step, step_done(step).grad_norm)) for step in range(1, 41)
        ]
        chart = charts(tmp_path / name, events, a_record())["grad_norm"]
        assert chart.labels.unit == unit
        assert [rule.title for rule in chart.rules if rule.kind == "limit"] == ["clipped above 0.3"]


def test_memory_has_the_prediction_as_a_line_above_what_was_used(tmp_path: Path) -> None:
    chart = charts(tmp_path, [step_done(step) for step in range(1, 21)], a_record())["memory"]
    (allocated,) = [rule for rule in chart.rules if rule.kind == "first predicted"]
    assert allocated.title == "allocated, predicted: 9.00 GiB"
    assert allocated.is_level
    assert allocated.at < curve_of(chart, "first")[0][1]
    assert {curve.kind for curve in chart.curves} == {"first", "third", "host"}


@pytest.mark.parametrize(
    "events",
    [
        [step_done(1)],
        [eval_done(0, 2.0)],
        [step_done(1, loss=NAN, learning_rate=NAN, grad_norm=INF, tokens_per_second=NAN)],
        [step_done(step, loss=NAN) for step in range(1, 50)],
        [step_done(step, loss=1e308 * (-1) ** step) for step in range(1, 50)],
        [step_done(step, loss=2.0, grad_norm=0.0, learning_rate=0.0) for step in range(1, 50)],
        [step_done(1), step_done(2**40)],
    ],
)
def test_odd_runs_have_charts_too(tmp_path: Path, events: list[Event]) -> None:
    for chart in charts(tmp_path, events, a_record()).values():
        assert all(0 <= tick.place <= 1 for tick in (*chart.x_ticks, *chart.y_ticks))
        assert not re.search("nan|inf", "".join(curve.path for curve in chart.curves))


def test_an_empty_history_has_no_charts(tmp_path: Path) -> None:
    assert charts(tmp_path, []) == {}


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    events: list[Event] = []
    for step in range(1, 5001):
        events += [step_done(step), eval_done(step, 2.0), CheckpointSaved(step=step, path=Path("c"))]
    for chart in charts(tmp_path, events).values():
        assert all(len(re.findall("[ML]", curve.path)) <= MOST_POINTS for curve in chart.curves)
        assert len(chart.bands) <= MOST_BANDS
        assert len(chart.marks) <= 2 * MOST_MARKS
        assert sum(band.width for band in chart.bands) == WIDTH
