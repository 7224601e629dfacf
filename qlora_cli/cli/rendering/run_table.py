"""The text of `qlora runs`: a line for each run, readable at 80 columns."""

from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from qlora_cli.cli.console import console
from qlora_cli.runs.summary import RunSummary
from qlora_cli.units import format_bytes
from qlora_cli.visible import visible

HEADINGS = ("run", "state", "step", "loss", "best", "tok/s", "memory")
STYLES = {"running": "cyan", "done": "green", "interrupted": "yellow", "failed": "red", "killed": "yellow"}
GAP = "  "
LEAST_NAME = 12  # columns of a name that is shortened
LEFT_OUT = "…"
NOTHING = "-"


def render_runs(runs: Sequence[RunSummary], directory: Path) -> None:
    """Print a table of runs, named by their path below `directory`."""
    if not runs:
        console().print(Text(f"no runs in {directory}"), soft_wrap=True)
        return
    rows = [row_of(run, directory) for run in runs]
    width = console().width if console().is_terminal else None
    for line in table_lines(rows, width):
        console().print(line, soft_wrap=True)


def row_of(run: RunSummary, directory: Path) -> tuple[str, ...]:
    """Return the table cells of a run, by `HEADINGS`."""
    name = run.name if run.path == directory else str(run.path.relative_to(directory))
    return (
        visible(name).replace("\n", ""),
        run.state,
        f"{run.step:,}/{run.num_steps:,}" if run.num_steps else f"{run.step:,}",
        _loss(run.loss),
        _loss(run.best_loss),
        NOTHING if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
        _bytes(run.peak_reserved_bytes or run.peak_host_bytes),
    )


def table_lines(rows: Sequence[tuple[str, ...]], width: int | None) -> list[Text]:
    """Return a table with headings; names are shortened so that it has at most `width` columns."""
    widths = [max(len(row[column]) for row in (HEADINGS, *rows)) for column in range(len(HEADINGS))]
    if width is not None:
        others = sum(widths[1:]) + len(GAP) * (len(widths) - 1)
        widths[0] = min(widths[0], max(LEAST_NAME, width - others))
    lines = [_line(HEADINGS, widths, state_style="bold")]
    lines[0].stylize("bold")
    return lines + [_line(row, widths, state_style=STYLES[row[1]]) for row in rows]


def _line(row: tuple[str, ...], widths: Sequence[int], *, state_style: str) -> Text:
    name, state, *figures = row
    cells = [f"{figure:>{width}}" for figure, width in zip(figures, widths[2:], strict=True)]
    return Text.assemble(
        f"{_shortened(name, widths[0]):<{widths[0]}}",
        GAP,
        (f"{state:<{widths[1]}}", state_style),
        GAP,
        GAP.join(cells),
    )


def _shortened(name: str, width: int) -> str:
    """Return a name without its middle, because the ends of names distinguish runs."""
    if len(name) <= width:
        return name
    end = (width - len(LEFT_OUT)) // 2
    return name[: width - len(LEFT_OUT) - end] + LEFT_OUT + name[len(name) - end :]


def _loss(loss: float | None) -> str:
    return NOTHING if loss is None else f"{loss:.4g}" if loss >= 1000 else f"{loss:.4f}"


def _bytes(num_bytes: int | None) -> str:
    return NOTHING if num_bytes is None else format_bytes(num_bytes)
