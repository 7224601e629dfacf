"""The text of `qlora runs`: a line for each run, readable at 80 columns."""

from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from qlora_cli.cli.console import console, shortened
from qlora_cli.runs.history import parse_time
from qlora_cli.runs.summary import RunSummary
from qlora_cli.units import format_bytes
from qlora_cli.visible import visible

HEADINGS = ("run", "state", "step", "loss", "best", "tok/s", "memory", "rank", "model", "data", "started")
NUM_TEXTS = 2  # columns that are aligned to the left, before the figures; those after `rank` are, too
FIRST_OF_DETAILS = HEADINGS.index("rank")
# Left out of a narrow window, one after the other; `qlora runs show` and --json have them.
DISPENSABLE = ("data", "memory", "tok/s", "started", "model", "rank")
MOST_MODEL = 24  # columns of a model's or a data set's name
STYLES = {"running": "cyan", "done": "green", "interrupted": "yellow", "failed": "red", "killed": "yellow"}
GAP = "  "
LEAST_NAME, SHORT_NAME = 12, 20  # columns of a name that is shortened: at least, and before details are left out
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
        NOTHING if run.rank is None else f"{run.rank:,}",
        _last_part(run.model),
        ", ".join(map(_last_part, run.dataset)) or NOTHING,
        f"{started:%Y-%m-%d %H:%M}" if (started := parse_time(run.started)) else NOTHING,
    )


def _last_part(name: str | None) -> str:
    """Return the end of a path or hub id, which tells it from others."""
    last = visible((name or "").rstrip("/").rpartition("/")[2]).replace("\n", "")
    return shortened(last, MOST_MODEL) or NOTHING


def table_lines(rows: Sequence[tuple[str, ...]], width: int | None) -> list[Text]:
    """Return a table with headings in at most `width` columns: details are left out, then names are shortened."""
    shown = list(range(len(HEADINGS)))
    widths = [max(len(row[column]) for row in (HEADINGS, *rows)) for column in shown]
    if width is not None:
        short = [min(widths[0], SHORT_NAME), *widths[1:]]
        for heading in DISPENSABLE:
            if _total(short, shown) > width:
                shown.remove(HEADINGS.index(heading))
        others = _total(widths, shown) - widths[0]
        widths[0] = min(widths[0], max(LEAST_NAME, width - others))
    lines = [_line(HEADINGS, widths, shown, state_style="bold")]
    lines[0].stylize("bold")
    return lines + [_line(row, widths, shown, state_style=STYLES[row[1]]) for row in rows]


def _total(widths: Sequence[int], shown: Sequence[int]) -> int:
    return sum(widths[column] for column in shown) + len(GAP) * (len(shown) - 1)


def _line(row: tuple[str, ...], widths: Sequence[int], shown: Sequence[int], *, state_style: str) -> Text:
    cells: list[str | tuple[str, str]] = []
    for column in shown:
        text, width = row[column], widths[column]
        is_figure = NUM_TEXTS <= column <= FIRST_OF_DETAILS
        cell = f"{text:>{width}}" if is_figure else f"{shortened(text, width):<{width}}"
        cells += [GAP if cells else "", (cell, state_style) if HEADINGS[column] == "state" else cell]
    line = Text.assemble(*cells)
    line.rstrip()
    return line


def _loss(loss: float | None) -> str:
    return NOTHING if loss is None else f"{loss:.4g}" if loss >= 1000 else f"{loss:.4f}"


def _bytes(num_bytes: int | None) -> str:
    return NOTHING if num_bytes is None else format_bytes(num_bytes)
