"""The page of a search: loss over learning rate, a line for each length of the trials. One self-contained file."""

from collections.abc import Iterator, Sequence
from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from qlora_cli import __version__
from qlora_cli.charts.axis_range import spanning
from qlora_cli.charts.canvas import ChartSize, drawing_style
from qlora_cli.charts.line_chart import Curve, LineChart, Mark, MarkLook, Rule, embedded_line_chart
from qlora_cli.charts.page_svg import PAGE_CSS
from qlora_cli.tuning.tuning_result import TrialResult, TuneResult
from qlora_cli.units import counted, format_duration
from qlora_cli.visible import visible

TEMPLATE = "tune.html.jinja"
SIZES = (
    ChartSize(name="wide", width=1000, height=362, num_ticks=8),
    ChartSize(name="medium", width=560, height=310, num_ticks=6),
    ChartSize(name="narrow", width=340, height=290, num_ticks=4),
)
COLORS = ("first", "second", "third")  # of the rounds, the longest first
NUM_LEVELS = 5
NUM_STDERRS = 2
DOT, CHOSEN = 6.0, 11.0  # pixels


def tuning_page(result: TuneResult) -> str:
    """Return the page as HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"visible": visible, "duration": format_duration, "loss": "{:.4f}".format}
    template = environment.from_string(resources.files("qlora_cli.tuning").joinpath(TEMPLATE).read_text("utf-8"))
    with drawing_style():
        svg = embedded_line_chart(tuning_chart(result), "loss_by_rate", SIZES, description=_description(result))
    return template.render(
        result=result,
        legend=[(COLORS[at], counted(steps, "step")) for at, steps in enumerate(_rounds(result)[: len(COLORS)])],
        chart=Markup(svg),  # noqa: S704 - its text is escaped
        chart_css=Markup(PAGE_CSS),  # noqa: S704 - ours
        version=__version__,
    )


def tuning_chart(result: TuneResult) -> LineChart:
    """Return the chart: the mean loss of each trial, with two standard errors up and down."""
    measured = [trial for trial in result.trials if trial.loss is not None and trial.verdict != "diverged"]
    ends = [end for trial in measured for end in _ends(trial)]
    rules = [Rule("bad", rate, f"{rate:g} diverged", is_level=False) for rate in _diverged(result)]
    return LineChart(
        x=spanning([trial.learning_rate for trial in result.trials], is_log=True),
        y=spanning([*ends, result.start_loss]),
        x_name="learning rate",
        num_levels=NUM_LEVELS,
        curves=tuple(_curves(result, measured)),
        rules=(Rule("muted", result.start_loss, f"before training {result.start_loss:.4f}", is_level=True), *rules),
        marks=tuple(_marks(result, measured)),
    )


def _rounds(result: TuneResult) -> list[int]:
    """Return the steps of the trials, the longest first."""
    return sorted({trial.num_steps for trial in result.trials}, reverse=True)


def _diverged(result: TuneResult) -> list[float]:
    """Return the rates none of whose trials counts."""
    counts = {trial.learning_rate for trial in result.trials if trial.verdict != "diverged"}
    return sorted({trial.learning_rate for trial in result.trials} - counts)


def _ends(trial: TrialResult) -> tuple[float, float]:
    loss, reach = trial.loss or 0.0, NUM_STDERRS * (trial.loss_stderr or 0.0)
    return loss - reach, loss + reach


def _curves(result: TuneResult, measured: Sequence[TrialResult]) -> Iterator[Curve]:
    for color, steps in zip(COLORS, _rounds(result), strict=False):
        of_round = sorted(
            (trial for trial in measured if trial.num_steps == steps), key=lambda trial: trial.learning_rate
        )
        if of_round:
            yield Curve(color, [(trial.learning_rate, trial.loss or 0.0) for trial in of_round])
        for trial in of_round:
            yield Curve(color, [(trial.learning_rate, end) for end in _ends(trial)], is_faint=True)


def _marks(result: TuneResult, measured: Sequence[TrialResult]) -> Iterator[Mark]:
    rounds = _rounds(result)
    for trial in sorted(measured, key=lambda trial: trial.num_steps):
        at = rounds.index(trial.num_steps)
        is_chosen = at == 0 and trial.learning_rate == result.learning_rate
        color = COLORS[min(at, len(COLORS) - 1)]
        look = MarkLook("good" if is_chosen else color, CHOSEN if is_chosen else DOT, is_ring=is_chosen)
        text = f"{trial.learning_rate:g}, {counted(trial.num_steps, 'step')}\nloss {trial.loss:.4f}"
        yield Mark(look, trial.learning_rate, trial.loss or 0.0, text)


def _description(result: TuneResult) -> str:
    return f"Held-out loss over learning rate; the lowest is at {result.learning_rate:g}."
