"""The loss chart: each step, the moving mean, the held-out data, and the events of the run."""

from collections.abc import Iterator

from qlora_cli.charts.axis_range import AxisRange, spanning
from qlora_cli.charts.line_chart import Mark, MarkLook
from qlora_cli.charts.series import FEWEST_TO_SMOOTH, Series, is_drawable, window_of
from qlora_cli.runs.history import RunHistory
from qlora_cli.runs.report.step_chart import (
    MAX_MARKS,
    Labels,
    LegendEntry,
    Line,
    RunChart,
    chart_of,
    spread_over,
)
from qlora_cli.units import counted

NUM_LEVELS = 8
TYPICAL = 0.98  # share of the losses that determines the range of the chart, if the others are far away
FAR = 3  # times the span of typical losses
MARGIN = 0.15  # of that span, above and below it, if others are left outside
# Shares of the height for marks without a value.
ABOVE, BELOW, SAVED_AT, SKIPPED_AT = 0.988, 0.012, 0.018, 0.054
HELD_OUT, BEST = MarkLook("second", 6), MarkLook("second", 12, is_ring=True)
SAVED, SKIPPED, OUTSIDE = MarkLook("good", 6), MarkLook("bad", 6), MarkLook("bad", 5)


def loss_chart(history: RunHistory) -> RunChart | None:
    """Return the chart of the losses of the steps and of the held-out data."""
    losses = Series(history.steps.step, history.steps.loss)
    held_out = Series([done.step for done in history.evaluations], [done.loss for done in history.evaluations])
    if not losses.drawable and not held_out.drawable:
        return None
    y = _loss_range(losses, held_out)
    labels = Labels(
        name="loss",
        title="Loss",
        unit="nats a token" if history.compared is None else f"mean over {history.compared}",
        remark=_outside_remark(losses, y),
        description=_describe(losses, history),
        legend=(*_line_entries(losses, history), *_event_entries(history)),
    )
    lines = [
        Line(color="first", name="loss", series=losses, spec=".4f", has_mean=True),
        Line(color="second", name="held out", series=held_out, spec=".4f"),
    ]
    marks = (*_outside_marks(losses, y), *_event_marks(history, y), *_evaluation_marks(history))
    return chart_of(history, labels, lines, y, marks=marks, num_levels=NUM_LEVELS)


def _line_entries(losses: Series, history: RunHistory) -> Iterator[LegendEntry]:
    if len(losses) >= FEWEST_TO_SMOOTH:
        yield LegendEntry("raw", "each step")
        yield LegendEntry("first", f"mean of {window_of(len(losses)):,} steps")
    elif losses.drawable:
        yield LegendEntry("first", "each step")
    if history.best is not None:
        yield LegendEntry("second", "held out")
        yield LegendEntry("best", f"best: {history.best.loss:.4f} at step {history.best.step:,}")


def _loss_range(losses: Series, held_out: Series) -> AxisRange:
    """Return a range for most of the losses, so that a few outliers do not flatten all others."""
    inside = losses.drawable
    ordered = sorted(inside)
    num_left_out = int(len(ordered) * (1 - TYPICAL) / 2)
    typical = ordered[num_left_out : len(ordered) - num_left_out]
    if typical and ordered[-1] - ordered[0] > FAR * (typical[-1] - typical[0]) > 0:
        margin = (typical[-1] - typical[0]) * MARGIN
        inside = [typical[0] - margin, typical[-1] + margin]
    return spanning([*inside, *held_out.drawable])


def _outside_marks(losses: Series, y: AxisRange) -> Iterator[Mark]:
    """Yield a mark at the edge for each loss outside of the axis, or that is not a number."""
    outside = [(step, value) for step, value in zip(losses.steps, losses.values, strict=True) if not y.contains(value)]
    for step, value in spread_over(outside):
        is_below = is_drawable(value) and value < y.low
        yield Mark(OUTSIDE, step, y.at(BELOW if is_below else ABOVE), f"step {step:,}: loss {value:.5g}")


def _outside_remark(losses: Series, y: AxisRange) -> str:
    parts = []
    if far := [value for value in losses.drawable if not y.contains(value)]:
        parts.append(f"{counted(len(far), 'step')} outside of the chart, up to {max(far):.5g}")
    if num_others := sum(not is_drawable(value) for value in losses.values):
        parts.append(f"{counted(num_others, 'step')} with a loss that is no finite number")
    return "; ".join(parts)


def _describe(losses: Series, history: RunHistory) -> str:
    parts = ["Loss by step."]
    if drawable := losses.drawable:
        parts.append(f"It begins at {drawable[0]:.4f} and ends at {drawable[-1]:.4f}.")
    if history.best is not None:
        parts.append(
            f"The best of {counted(len(history.evaluations), 'evaluation')} on held-out data is "
            f"{history.best.loss:.4f} at step {history.best.step:,}."
        )
    return " ".join(parts)


def _evaluation_marks(history: RunHistory) -> Iterator[Mark]:
    best = history.best
    shown = [done for done in history.evaluations if is_drawable(done.loss)]
    for done in shown if len(shown) <= MAX_MARKS else []:
        yield Mark(HELD_OUT, done.step, done.loss, f"step {done.step:,}: held-out {done.loss:.4f}")
    if best is not None:
        yield Mark(BEST, best.step, best.loss, f"step {best.step:,}: held-out {best.loss:.4f}, the best")


def _event_marks(history: RunHistory, y: AxisRange) -> Iterator[Mark]:
    """Yield marks along the lower edge: steps that were skipped, and checkpoints."""
    for event in spread_over(history.checkpoints):
        yield Mark(SAVED, event.step, y.at(SAVED_AT), f"step {event.step:,}: checkpoint")
    for skipped in spread_over(history.skipped):
        yield Mark(SKIPPED, skipped.step, y.at(SKIPPED_AT), f"step {skipped.step:,}: skipped: not finite")


def _event_entries(history: RunHistory) -> Iterator[LegendEntry]:
    if history.checkpoints:
        yield LegendEntry("saved", "checkpoint")
    if history.skipped:
        yield LegendEntry("skipped", f"skipped: {counted(len(history.skipped), 'step')}")
    if history.resumes:
        yield LegendEntry("resumed", "resumed")
