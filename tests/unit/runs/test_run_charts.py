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


def health(names: list[str], **changed: object) -> dict[str, object]:
    """Return what a run records of modules of rank 8, of which the nth has an effective rank of n + 1."""
    module = {"rank": 8, "update_norm": 1.0, "weight_norm": 50.0, "lost_share": 0.1}
    modules = [{**module, "name": name, "effective_rank": at + 1.0, **changed} for at, name in enumerate(names)]
    whole = {"rank": 8, "effective_rank": 2.5, "relative_norm": 0.02, "lost_share": 0.1, "merge_dtype": "bf16"}
    return {"adapter_health": {**whole, "num_unmeasured": 0, "modules": modules}}


def test_an_adapter_has_charts_by_layer_of_its_modules(tmp_path: Path) -> None:
    names = ["model.layers.10.q_proj", "model.layers.2.q_proj", "model.layers.2.k_proj", "lm_head"]
    named = charts(tmp_path, [step_done(1)], a_record(result=health(names)))
    ranks, norms = named["effective_rank"].chart, named["update_norm"].chart
    assert points_of(ranks, "first") == [(2, 2.5), (10, 1.0)]
    assert (points_of(ranks, "second")[0], points_of(ranks, "third")[0]) == ((2, 3.0), (2, 2.0))
    assert [rule.at for rule in ranks.rules] == [8]
    assert ranks.y.contains(8)
    assert ranks.notes[0].text == "layer 2\nq_proj 2.0\nk_proj 3.0"
    assert points_of(norms, "first") == [(2, 2.0), (10, 2.0)]
    assert drawn_charts(list(named.values()))


@pytest.mark.parametrize("value", [NAN, INF, None])
def test_modules_whose_figures_can_not_be_drawn_have_no_chart(value: float | None, tmp_path: Path) -> None:
    record = a_record(result=health(["model.layers.0.q_proj", f"model.layers.{9**40}.q_proj"], weight_norm=value))
    named = charts(tmp_path, [step_done(1)], record)
    assert ("update_norm" in named) == (value == INF)  # by which the update is nothing
    assert drawn_charts(list(named.values()))


def test_a_damaged_record_of_an_adapter_is_left_out_and_the_rest_is_shown(tmp_path: Path) -> None:
    record = a_record(result={"steps": 3, "adapter_health": {"x": 1}})
    assert "effective_rank" not in charts(tmp_path, [step_done(1)], record)
    run = read_run(tmp_path)
    assert run.record.result is not None
    assert (run.record.result.steps, run.record.result.adapter_health) == (3, None)
    assert any("adapter_health" in problem for problem in run.summary.problems)
