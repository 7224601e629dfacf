"""The table of `--sweep`: a line for each value of one setting, a grid for two, a grid for each value of a third."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from textwrap import wrap

from rich.text import Text

from qlora_cli.cli.console import console, title
from qlora_cli.cli.rendering.memory_verdict import significant, with_article
from qlora_cli.memory.bands import verdict
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import MemoryReport, SweepPoint
from qlora_cli.units import GIB

WIDTH = 80
MARKS = {"yes": " ", "tight": "~", "no": "!"}
MAX_COLUMNS = 6  # of a grid, next to the names of its rows


def render_sweep(report: MemoryReport, gpu: Gpu | None) -> None:
    """Print the process memory and the speed of every combination, marked where it does not fit on `gpu`."""
    marks = f"; ! does not fit on the {gpu.name}, ~ is tight" if gpu else ""
    memory = "Process memory in GiB"
    if report.plan is not None:  # which is for the run alone
        memory += f" with gradient checkpointing {report.sweep[0].gradient_checkpointing}"
    if is_timed := all(point.tokens_per_second is not None for point in report.sweep):
        speed = f"on {with_article(report.gpu)}, by arithmetic"
    if len(report.sweep[0].values) == 1:
        _print(f"{memory}{f', and time {speed}' if is_timed else ''}{marks}", column_lines(report, gpu))
        return
    _print(f"{memory}{marks}", grid_lines(report, lambda point: _cell(report, point, gpu)))
    if is_timed:
        _print(f"Tokens/s {speed}", grid_lines(report, lambda point: f"{point.tokens_per_second:,.0f} "))


def _print(heading: str, lines: Sequence[str]) -> None:
    console().print()
    for line in wrap(heading, WIDTH, subsequent_indent="  "):
        title(line)
    for line in lines:
        console().print(Text(line), soft_wrap=True)


def column_lines(report: MemoryReport, gpu: Gpu | None) -> list[str]:
    """Return a line for each value of the one setting that was swept: memory, seconds a step, tokens/s."""
    (name,) = report.sweep[0].values
    lines = [f"  {name} {'GiB':>8}  {'s a step':>9} {'tokens/s':>9}"]
    for point in report.sweep:
        line = f"  {point.values[name]:>{len(name)},} {_cell(report, point, gpu):>9}"
        if point.step_seconds is not None and point.tokens_per_second is not None:
            line += f" {significant(point.step_seconds):>9} {point.tokens_per_second:>9,.0f}"
        lines.append(line.rstrip())
    return lines if report.sweep[0].step_seconds is not None else [f"  {name} {'GiB':>8}", *lines[1:]]


def grid_lines(report: MemoryReport, cell: Callable[[SweepPoint], str]) -> list[str]:
    """Return the lines of the table or tables."""
    values: dict[str, list[int]] = {}
    for point in report.sweep:
        for name, value in point.values.items():
            if value not in values.setdefault(name, []):
                values[name].append(value)
    cells = {_key(point.values): cell(point) for point in report.sweep}
    # The setting with the most values goes down the page, the next across it.
    down, across, *further = sorted(values, key=lambda name: -len(values[name]))
    lines = []
    for chosen in product(*(values[name] for name in further)):
        fixed = dict(zip(further, chosen, strict=True))
        lines += [f"  {name} {value:,}" for name, value in fixed.items()]
        for start in range(0, len(values[across]), MAX_COLUMNS):
            columns = values[across][start : start + MAX_COLUMNS]
            lines += _grid(cells, (down, values[down]), (across, columns), fixed)
    return lines


def _key(values: Mapping[str, int]) -> frozenset[tuple[str, int]]:
    return frozenset(values.items())


def _cell(report: MemoryReport, point: SweepPoint, gpu: Gpu | None) -> str:
    mark = MARKS[verdict(report, point, gpu.usable_bytes)] if gpu else " "
    return f"{point.process_bytes / GIB:.2f}{mark}"


def _grid(
    cells: Mapping[frozenset[tuple[str, int]], str],
    down: tuple[str, Sequence[int]],
    across: tuple[str, Sequence[int]],
    fixed: Mapping[str, int],
) -> list[str]:
    down_name, rows = down
    across_name, columns = across
    lines = [
        f"  {'':<{len(down_name)}}   {across_name}",
        f"  {down_name} " + "".join(f"{column:>8,} " for column in columns).rstrip(),
    ]
    for row in rows:
        shown = "".join(
            f"{cells.get(_key({down_name: row, across_name: column, **fixed}), '- '):>9}" for column in columns
        )
        lines.append(f"  {row:>{len(down_name)},} {shown}".rstrip())
    return lines
