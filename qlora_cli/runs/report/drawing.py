"""What a chart is made of, and what the charts of a run have in common. In units of the drawing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qlora_cli.runs.history import RunHistory
from qlora_cli.runs.report.axis import Axis, Tick, is_drawable, tick_label
from qlora_cli.runs.report.curve import HEIGHT, WIDTH, Series, path_of, smoothed, thinned

MOST_BANDS = 120
MOST_MARKS = 200
X_TICKS, Y_TICKS = 5, 5
SIDE_ROOM = 0.015  # of the steps, so that marks at the ends are whole
NOTHING = "\N{EN DASH}"


@dataclass(frozen=True)
class Curve:
    """A line; `kind` is its look."""

    kind: str
    path: str


@dataclass(frozen=True)
class Mark:
    """A dot, with what is said of it."""

    kind: str
    x: int
    y: int
    title: str


@dataclass(frozen=True)
class Rule:
    """A straight line across the chart: at a step, or at a value."""

    kind: str
    at: int
    title: str
    is_level: bool


@dataclass(frozen=True)
class Band:
    """A stretch of steps, with the figures that are shown when it is pointed at."""

    x: int
    width: int
    title: str


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    kind: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What stands around a chart; `description` is for those who don't see it."""

    name: str
    title: str
    unit: str = ""
    remark: str = ""
    description: str
    keys: tuple[Key, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Chart:
    """All there is to draw."""

    labels: Labels
    curves: tuple[Curve, ...]
    marks: tuple[Mark, ...]
    rules: tuple[Rule, ...]
    bands: tuple[Band, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A series to draw: its look, what it is called, and how its figures are written."""

    kind: str
    name: str
    series: Series
    spec: str
    has_mean: bool = False

    def curves(self, across: Axis, up: Axis) -> Iterator[Curve]:
        """Yield the line, or a faint one and its mean; nothing if no value is drawable."""
        if not self.series.drawable:
            return
        means = smoothed(self.series) if self.has_mean else []
        yield Curve("raw" if means else self.kind, path_of(thinned(self.series), across, up))
        if means:
            yield Curve(self.kind, path_of(means, across, up))


def chart_of(
    history: RunHistory,
    labels: Labels,
    lines: Sequence[Line],
    up: Axis,
    *,
    marks: Sequence[Mark] = (),
    rules: Sequence[Rule] = (),
    num_ticks: int = Y_TICKS,
) -> Chart:
    """Return a chart of `lines`, of which those of the optimizer's steps can be read by pointing at them."""
    across = step_axis(history)
    return Chart(
        labels=labels,
        curves=tuple(curve for line in lines for curve in line.curves(across, up)),
        marks=tuple(marks),
        rules=(*_resume_rules(history, across), *rules),
        bands=tuple(_bands([line for line in lines if line.series.steps is history.steps.step], across)),
        x_ticks=tuple(_step_ticks(across)),
        y_ticks=tuple(up.ticks(num_ticks)),
    )


def step_axis(history: RunHistory) -> Axis:
    """Return the axis that all charts of a run share."""
    steps = [*history.steps.step[:1], *history.steps.step[-1:], *(done.step for done in history.evaluations)]
    low, high = min(steps, default=0), max(steps, default=1)
    room = (high - low) * SIDE_ROOM or 0.5
    return Axis(low=low - room, high=high + room)


def _resume_rules(history: RunHistory, across: Axis) -> tuple[Rule, ...]:
    steps = sorted({event.step for event in history.resumes})
    return tuple(
        Rule("resumed", round(WIDTH * across.place(step)), f"resumed behind step {step:,}", is_level=False)
        for step in steps[:MOST_MARKS]
        if across.holds(step)
    )


def level(value: float, up: Axis) -> int:
    """Return how far down in the drawing a value stands."""
    return round(HEIGHT * (1 - up.place(value)))


def _step_ticks(across: Axis) -> Iterator[Tick]:
    """Yield whole steps."""
    for tick in across.ticks(X_TICKS):
        step = across.low + tick.place * (across.high - across.low)
        if abs(step - round(step)) < 1e-6:
            yield Tick(tick.place, tick_label(round(step), 1))


def _bands(lines: Sequence[Line], across: Axis) -> Iterator[Band]:
    """Yield stretches of steps that cover the chart, with the figures of each."""
    steps = lines[0].series.steps
    total = len(steps)
    num_bands = min(total, MOST_BANDS)
    starts = [band * total // num_bands for band in range(num_bands)]
    edges = [*(_between(steps, start, across) for start in starts), WIDTH]
    for start, end, left, right in zip(starts, [*starts[1:], total], edges, edges[1:], strict=False):
        first, last = steps[start], steps[end - 1]
        title = [f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"]
        title += [f"{line.name} {_range(line.series.values[start:end], line.spec)}" for line in lines]
        yield Band(left, right - left, "\n".join(title))


def _between(steps: Sequence[int], place: int, across: Axis) -> int:
    """Return the middle between a step and the one before."""
    if place == 0:
        return 0
    return round(WIDTH * across.place((steps[place - 1] + steps[place]) / 2))


def _range(values: Sequence[float], spec: str) -> str:
    found = [value for value in values if is_drawable(value)]
    if not found:
        return NOTHING
    low, high = format(min(found), spec), format(max(found), spec)
    return low if low == high else f"{low} to {high}"
