"""The text of `qlora runs show`."""

from collections.abc import Iterator, Sequence

from qlora_cli.charts.series import Series, smoothed
from qlora_cli.cli.console import Row, console, print_lines, print_rows, title
from qlora_cli.cli.sparkline import can_show_blocks, sparkline
from qlora_cli.events import EvalDone
from qlora_cli.runs.detail import RunDetail
from qlora_cli.runs.history import RunHistory, parse_time
from qlora_cli.runs.record import SettingUsed
from qlora_cli.runs.samples import Sample
from qlora_cli.runs.summary import RunSummary
from qlora_cli.units import counted, format_bytes, format_duration
from qlora_cli.visible import visible

CURVE_CELLS = 60
MAX_EVALUATIONS = 12
MAX_NOTES = 12


def render_run(detail: RunDetail, history: RunHistory) -> None:
    """Print a run."""
    summary = detail.summary
    title(f"{_shown(summary.name)}: {summary.sentence[0].lower()}{summary.sentence[1:]}")
    print_rows([*_run_rows(summary, history), *_memory_rows(summary), *_end_rows(detail)])
    _section("Settings that are not default", setting_lines(detail.settings))
    _section("Held-out loss", evaluation_lines(detail.evaluations))
    _section("Answers", sample_lines(detail.samples))
    _section("Notes", note_lines(detail))


def _section(heading: str, lines: Sequence[str]) -> None:
    if not lines:
        return
    title(heading)
    print_lines(lines)


def _run_rows(summary: RunSummary, history: RunHistory) -> list[Row]:
    started = parse_time(summary.started)
    rows = [
        ("model", _shown(summary.model or "")),
        ("data", _shown(", ".join(summary.dataset))),
        ("started", f"{started:%Y-%m-%d %H:%M} UTC" if started else ""),
        ("trained for", format_duration(summary.duration_seconds) if summary.duration_seconds else ""),
        ("loss", "" if summary.loss is None else f"{summary.loss:.4f} at the last step"),
        ("", _curve(history) if can_show_blocks(console().encoding) else ""),
        ("held-out loss", _best(summary, history)),
        ("preferences", "" if summary.rewards is None else f"{summary.rewards}{_of_which(history)}"),
        ("speed", _speed(summary.tokens_per_second)),
    ]
    return [(name, value) for name, value in rows if value]


def _of_which(history: RunHistory) -> str:
    return ", held out, at the last evaluation" if history.evaluations else ", at the last step"


def _speed(tokens_per_second: float | None) -> str:
    return "" if tokens_per_second is None else f"{tokens_per_second:,.0f} tokens/s over all steps"


def _curve(history: RunHistory) -> str:
    """Return the loss in one line, smoothed, because a single spike would flatten everything else."""
    losses = Series(history.steps.step, history.steps.loss)
    return sparkline([value for _, value in smoothed(losses)] or losses.values, CURVE_CELLS)


def _best(summary: RunSummary, history: RunHistory) -> str:
    if summary.best_loss is None:
        return ""
    last = history.evaluations[-1]
    at_the_end = "" if last.step == summary.best_step else f", {last.loss:.4f} at the last evaluation"
    return f"{summary.best_loss:.4f} at step {summary.best_step:,}, the best{at_the_end}"


def _memory_rows(summary: RunSummary) -> list[Row]:
    figures = (
        ("allocated", summary.peak_allocated_bytes, summary.predicted_allocated_bytes),
        ("reserved", summary.peak_reserved_bytes, summary.predicted_reserved_bytes),
        ("host", summary.peak_host_bytes, None),
    )
    return [
        (f"{name} memory", _against(measured, predicted))
        for name, measured, predicted in figures
        if measured is not None or predicted is not None
    ]


def _against(measured: int | None, predicted: int | None) -> str:
    if measured is None:
        return f"{format_bytes(predicted or 0)} predicted"
    if predicted is None:
        return f"{format_bytes(measured)} at its peak"
    return (
        f"{format_bytes(measured)} at its peak, {format_bytes(predicted)} predicted ({predicted / measured - 1:+.1%})"
    )


def _end_rows(detail: RunDetail) -> Iterator[Row]:
    summary = detail.summary
    if summary.checkpoints:
        yield "checkpoints", _shown(", ".join(path.name for path in summary.checkpoints))
    if detail.resumed_from:
        yield "resumed", f"after step {', '.join(f'{step:,}' for step in detail.resumed_from)}"
    if detail.adapter_health:
        yield "adapter", _shown(detail.adapter_health.sentence)
    if detail.forgetting:
        yield "general text", _shown(detail.forgetting.sentence)
    if summary.error:
        yield "error", _shown(summary.error)
    if detail.next_step:
        yield "next", _shown(detail.next_step)


def setting_lines(settings: Sequence[SettingUsed]) -> list[str]:
    """Return a line for each setting: name, value and where it came from."""
    widths = [
        max((len(text) for text in texts), default=0)
        for texts in (
            [setting.path for setting in settings],
            [_shown(setting.text) for setting in settings if len(setting.text) <= CURVE_CELLS],
        )
    ]
    return [
        f"  {setting.path:<{widths[0]}}  {_shown(setting.text):<{widths[1]}}  {_shown(setting.origin)}"
        for setting in settings
    ]


def evaluation_lines(evaluations: Sequence[EvalDone]) -> list[str]:
    """Return a line for each of the last evaluations, and for the best if it is not one of them."""
    best = max((index for index, done in enumerate(evaluations) if done.is_best), default=None)
    first = max(0, len(evaluations) - MAX_EVALUATIONS)
    lines = [f"  {counted(first, 'earlier evaluation')} left out"] if first else []
    width = max((len(f"{done.step:,}") for done in evaluations), default=0)
    for index, done in enumerate(evaluations):
        if index >= first or index == best:
            rewards = "" if done.rewards is None else f"  {done.rewards}"
            is_best = "  the best" if index == best else ""
            lines.append(f"  step {done.step:>{width},}  {done.loss:.4f}{rewards}{is_best}")
    return lines


def sample_lines(samples: Sequence[Sample]) -> list[str]:
    """Return each prompt, with its answers below."""
    lines = []
    for sample in samples:
        lines += _indented(sample.prompt, "  ")
        for answer in sample.answers:
            lines.append(f"    {answer.when}:")
            lines += _indented(answer.text, "      ")
    return lines


def note_lines(detail: RunDetail) -> list[str]:
    """Return the problems, the skipped steps and the notes."""
    lines = [f"  {problem}" for problem in detail.summary.problems]
    lines += [f"  step {skipped.step:,} was skipped: {_shown(skipped.reason)}" for skipped in detail.skipped_steps]
    lines += [f"  {'warning: ' if note.level == 'warning' else ''}{_shown(note.message)}" for note in detail.notes]
    left_out = len(lines) - MAX_NOTES
    return lines if left_out <= 0 else [*lines[:MAX_NOTES], f"  and {left_out:,} more, which --json has"]


def _indented(text: str, indent: str) -> list[str]:
    return [f"{indent}{_shown(line)}".rstrip() for line in text.split("\n")]


def _shown(text: str) -> str:
    """Return untrusted text in one line, with invisible characters made visible."""
    return visible(text, is_end=False).replace("\n", "")
