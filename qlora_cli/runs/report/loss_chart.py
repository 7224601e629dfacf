"""The chart of the loss: each step, their mean, the held-out data, and what happened on the way."""

import math
from collections.abc import Iterator

from qlora_cli.runs.history import RunHistory
from qlora_cli.runs.report.axis import Axis, is_drawable, spanning
from qlora_cli.runs.report.curve import FEWEST_TO_SMOOTH, HEIGHT, WIDTH, Series, drawn, window_of
from qlora_cli.runs.report.drawing import MOST_MARKS, Chart, Key, Labels, Line, Mark, chart_of, step_axis
from qlora_cli.units import counted

Y_TICKS = 8
TYPICAL = 0.98  # share of the losses that decides how tall the chart is, if the others are far away
FAR = 3  # times the span of typical losses
ROOM_BEYOND = 0.15  # of that span, above and below it, if others are left outside
FROM_EDGE, FROM_FOOT = 12, 18  # units of the drawing, of the marks that stand for no value


def loss_chart(history: RunHistory) -> Chart | None:
    """Return the chart of the loss, of the steps and of the held-out data."""
    losses = Series(history.steps.step, history.steps.loss)
    held_out = Series([done.step for done in history.evaluations], [done.loss for done in history.evaluations])
    if not losses.drawable and not held_out.drawable:
        return None
    across, up = step_axis(history), _loss_axis(losses, held_out)
    labels = Labels(
        name="loss",
        title="Loss",
        unit="nats a token",
        remark=_outside_remark(losses, up),
        description=_describe(losses, history),
        keys=(*_line_keys(losses, history), *_event_keys(history)),
    )
    lines = [
        Line(kind="first", name="loss", series=losses, spec=".4f", has_mean=True),
        Line(kind="second", name="held out", series=held_out, spec=".4f"),
    ]
    marks = (*_outside(losses, across, up), *_evaluation_marks(history, across, up), *_event_marks(history, across))
    return chart_of(history, labels, lines, up, marks=marks, num_ticks=Y_TICKS)


def _line_keys(losses: Series, history: RunHistory) -> Iterator[Key]:
    if len(losses) >= FEWEST_TO_SMOOTH:
        yield Key("raw", "each step")
        yield Key("first", f"mean of {window_of(len(losses)):,} steps")
    elif losses.drawable:
        yield Key("first", "each step")
    if history.best is not None:
        yield Key("second", "held out")
        yield Key("best", f"best: {history.best.loss:.4f} at step {history.best.step:,}")


def _loss_axis(losses: Series, held_out: Series) -> Axis:
    """Return an axis for most of the losses; a few that are far away must not flatten all others."""
    inside = losses.drawable
    ordered = sorted(inside)
    cut = int(len(ordered) * (1 - TYPICAL) / 2)
    typical = ordered[cut : len(ordered) - cut]
    if typical and ordered[-1] - ordered[0] > FAR * (typical[-1] - typical[0]) > 0:
        room = (typical[-1] - typical[0]) * ROOM_BEYOND
        inside = [typical[0] - room, typical[-1] + room]
    return spanning([*inside, *held_out.drawable])


def _outside(losses: Series, across: Axis, up: Axis) -> Iterator[Mark]:
    """Yield a mark at the edge for each loss that the axis does not hold, or that is no number."""
    found = [(step, value) for step, value in zip(losses.steps, losses.values, strict=True) if not up.holds(value)]
    for step, value in found[:: math.ceil(len(found) / MOST_MARKS) or 1]:
        is_below = is_drawable(value) and value < up.low
        x, _ = drawn(step, up.low, across, up)
        yield Mark("beyond", x, HEIGHT - FROM_EDGE if is_below else FROM_EDGE, f"step {step:,}: loss {value:.5g}")


def _outside_remark(losses: Series, up: Axis) -> str:
    parts = []
    if far := [value for value in losses.drawable if not up.holds(value)]:
        parts.append(f"{counted(len(far), 'step')} outside of the chart, up to {max(far):.5g}")
    if num_others := sum(not is_drawable(value) for value in losses.values):
        parts.append(f"{counted(num_others, 'step')} with a loss that is no finite number")
    return "; ".join(parts)


def _describe(losses: Series, history: RunHistory) -> str:
    parts = ["Loss by step."]
    if found := losses.drawable:
        parts.append(f"It begins at {found[0]:.4f} and ends at {found[-1]:.4f}.")
    if history.best is not None:
        parts.append(
            f"The best of {counted(len(history.evaluations), 'evaluation')} on held-out data is "
            f"{history.best.loss:.4f} at step {history.best.step:,}."
        )
    return " ".join(parts)


def _evaluation_marks(history: RunHistory, across: Axis, up: Axis) -> Iterator[Mark]:
    best = history.best
    shown = [done for done in history.evaluations if is_drawable(done.loss)]
    for done in shown if len(shown) <= MOST_MARKS else []:
        yield Mark("held", *drawn(done.step, done.loss, across, up), f"step {done.step:,}: held-out {done.loss:.4f}")
    if best is not None:
        x, y = drawn(best.step, best.loss, across, up)
        yield Mark("best", x, y, f"step {best.step:,}: held-out {best.loss:.4f}, the best")


def _event_marks(history: RunHistory, across: Axis) -> Iterator[Mark]:
    """Yield marks along the lower edge: steps that were skipped, and checkpoints."""
    for kind, events, foot, what in (
        ("saved", history.checkpoints, FROM_FOOT, "checkpoint"),
        ("skipped", history.skipped, 3 * FROM_FOOT, "skipped: not finite"),
    ):
        for event in events[:: math.ceil(len(events) / MOST_MARKS) or 1]:
            yield Mark(kind, round(WIDTH * across.place(event.step)), HEIGHT - foot, f"step {event.step:,}: {what}")


def _event_keys(history: RunHistory) -> Iterator[Key]:
    if history.checkpoints:
        yield Key("saved", "checkpoint")
    if history.skipped:
        yield Key("skipped", f"skipped: {counted(len(history.skipped), 'step')}")
    if history.resumes:
        yield Key("resumed", "resumed")
