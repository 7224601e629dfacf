"""The charts of a run: what each shows, where its marks are, and that odd runs have charts too."""

from itertools import pairwise
from pathlib import Path

import pytest

from qlora_cli.charts.line_chart import LineChart
from qlora_cli.charts.series import MAX_POINTS, Point
from qlora_cli.events import CheckpointSaved, Event, StepSkipped, TrainingResumed
from qlora_cli.runs.find_runs import read_run
from qlora_cli.runs.report.loss_chart import BEST, OUTSIDE, SAVED, SKIPPED
from qlora_cli.runs.report.run_charts import charts_of
from qlora_cli.runs.report.run_page import drawn_charts
from qlora_cli.runs.report.step_chart import MAX_MARKS, MAX_STRETCHES, RunChart
from tests.support.runs.run_directories import a_record, eval_done, step_done, write_run

NAN, INF = float("nan"), float("inf")


def charts(folder: Path, events: list[Event], record: dict[str, object] | None = None) -> dict[str, RunChart]:
    run = read_run(write_run(folder, events, record))
    return {chart.labels.name: chart for chart in charts_of(run.history, run.summary, run.record)}


def points_of(chart: LineChart, color: str, *, is_faint: bool = False) -> list[Point]:
    (points,) = [curve.points for curve in chart.curves if (curve.color, curve.is_faint) == (color, is_faint)]
    return list(points)


def test_a_run_has_a_chart_for_each_figure_with_its_unit(tmp_path: Path) -> None:
    named_charts = charts(tmp_path, [step_done(step) for step in range(1, 101)], a_record())
    units = {name: chart.labels.unit for name, chart in named_charts.items()}
    assert units == {
        "loss": "nats a token",
        "learning_rate": "",
        "grad_norm": "",
        "tokens_per_second": "tokens a second",
        "memory": "GiB",
    }
    for named in named_charts.values():
        chart = named.chart
        assert 3 <= len(chart.y.ticks(chart.num_levels)) <= 8
        assert [label for _, label in chart.x.ticks(5, is_whole=True)] == ["0", "50", "100"]
        assert len(chart.notes) == 100
        assert chart.notes[6].text.startswith("step 7\n")
        assert named.labels.description


def test_the_loss_falls_and_the_best_evaluation_is_marked(tmp_path: Path) -> None:
    events: list[Event] = []
    for step in range(1, 101):
        events += [step_done(step), *([eval_done(step, 1.5 + abs(step - 60) / 100)] if step % 20 == 0 else [])]
    named = charts(tmp_path, events)["loss"]
    loss = named.chart
    raw, mean, held = points_of(loss, "first", is_faint=True), points_of(loss, "first"), points_of(loss, "second")
    assert len(raw) == 100
    assert all(left[0] < right[0] and left[1] >= right[1] for left, right in pairwise(raw))
    assert len(mean) == 100
    assert len(held) == 5
    (best,) = [mark for mark in loss.marks if mark.look == BEST]
    assert (best.x, best.y) == held[2]
    assert best.text == "step 60: held-out 1.5000, the best"
    assert "best: 1.5000 at step 60" in {entry.label for entry in named.labels.legend}


def test_events_are_marked_with_their_steps(tmp_path: Path) -> None:
    events: list[Event] = [step_done(step) for step in range(1, 41)]
    events += [StepSkipped(step=30, reason="nan", rows=()), CheckpointSaved(step=20, path=Path("c"))]
    events += [TrainingResumed(step=40, num_steps=100, checkpoint=Path("c"))]
    events += [step_done(step) for step in range(41, 81)]
    named_charts = charts(tmp_path, events)
    marks = {mark.look: mark for mark in named_charts["loss"].chart.marks}
    assert marks[SKIPPED].text == "step 30: skipped: not finite"
    assert (marks[SAVED].x, marks[SAVED].text) == (20, "step 20: checkpoint")
    for named in named_charts.values():
        (rule,) = [rule for rule in named.chart.rules if not rule.is_level]
        assert (rule.at, rule.text) == (40, "resumed after step 40")


def test_a_single_spike_neither_flattens_the_loss_nor_is_hidden(tmp_path: Path) -> None:
    losses = {50: 1e6, 60: NAN, 61: INF, 70: -INF}
    events: list[Event] = [step_done(step, loss=losses.get(step, step_done(step).loss)) for step in range(1, 301)]
    named = charts(tmp_path, events)["loss"]
    loss = named.chart
    means = [mean for _, mean in points_of(loss, "first")]
    assert max(means) - min(means) > (loss.y.high - loss.y.low) / 2
    outside = [mark for mark in loss.marks if mark.look == OUTSIDE]
    assert all(loss.y.contains(mark.y) for mark in outside)
    assert [mark.text for mark in outside] == [
        "step 50: loss 1e+06",
        "step 60: loss nan",
        "step 61: loss inf",
        "step 70: loss -inf",
    ]
    assert named.labels.remark == (
        "1 step outside of the chart, up to 1e+06; 3 steps with a loss that is no finite number"
    )
    assert (50, 1e6) in points_of(loss, "first", is_faint=True)


def test_gradient_norms_are_logarithmic_only_if_their_range_is_wide_and_positive(tmp_path: Path) -> None:
    for name, spike, unit in (("wide", 50.0, "logarithmic"), ("narrow", 1.0, ""), ("zero", 0.0, "")):
        norms = {9: spike, 10: 60.0 if name == "zero" else 0.3}
        events: list[Event] = [
            step_done(step, grad_norm=norms.get(step, step_done(step).grad_norm)) for step in range(1, 41)
        ]
        named = charts(tmp_path / name, events, a_record())["grad_norm"]
        assert named.labels.unit == unit
        assert named.chart.y.is_log == bool(unit)
        assert [(rule.at, rule.text) for rule in named.chart.rules] == [(0.3, "clipped above 0.3")]


def test_the_memory_chart_shows_the_prediction_as_a_line_above_the_usage(tmp_path: Path) -> None:
    chart = charts(tmp_path, [step_done(step) for step in range(1, 21)], a_record())["memory"].chart
    (allocated,) = [rule for rule in chart.rules if rule.color == "first"]
    assert allocated.text == "allocated, predicted: 9.00 GiB"
    assert allocated.is_level
    assert allocated.at == 9 > points_of(chart, "first")[0][1]
    assert {curve.color for curve in chart.curves} == {"first", "third", "host"}


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
    named = charts(tmp_path, events, a_record())
    assert named
    for labels, svg in drawn_charts(list(named.values())):
        assert labels.name in named
        assert svg.count("<svg") in (2, 3)
        assert "nan" not in svg.replace("loss nan", "")


def test_an_empty_history_has_no_charts(tmp_path: Path) -> None:
    assert charts(tmp_path, []) == {}


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    events: list[Event] = []
    for step in range(1, 5001):
        events += [step_done(step), eval_done(step, 2.0), CheckpointSaved(step=step, path=Path("c"))]
    for named in charts(tmp_path, events).values():
        chart = named.chart
        assert all(len(curve.points) <= MAX_POINTS for curve in chart.curves)
        assert len(chart.notes) <= MAX_STRETCHES
        assert len(chart.marks) <= 2 * MAX_MARKS
        edges = [note.x for note in chart.notes if isinstance(note.x, tuple)]
        assert (edges[0][0], edges[-1][1]) == (chart.x.low, chart.x.high)
        assert all(left[1] == right[0] for left, right in pairwise(edges))
