"""The table of `--sweep`: one column of sizes for one setting, a grid for two, a grid for each value of a third."""

from collections.abc import Mapping, Sequence
from itertools import product

from rich.text import Text

from qlora_cli.cli.console import console, title
from qlora_cli.memory.bands import verdict
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import MemoryReport, SweepPoint
from qlora_cli.units import GIB

MARKS = {"yes": " ", "tight": "~", "no": "!"}
MAX_COLUMNS = 6  # of a grid, next to the names of its rows


def render_sweep(report: MemoryReport, gpu: Gpu | None) -> None:
    """Print the process memory of every combination, marked where it does not fit on `gpu`."""
    console().print()
    title("Process memory in GiB" + (f"; ! does not fit on the {gpu.name}, ~ is tight" if gpu else ""))
    for line in sweep_lines(report, gpu):
        console().print(Text(line), soft_wrap=True)


def sweep_lines(report: MemoryReport, gpu: Gpu | None) -> list[str]:
    """Return the lines of the table or tables."""
    values: dict[str, list[int]] = {}
    for point in report.sweep:
        for name, value in point.values.items():
            if value not in values.setdefault(name, []):
                values[name].append(value)
    cells = {_key(point.values): _cell(report, point, gpu) for point in report.sweep}
    # The setting with the most values goes down the page, the next across it.
    down, *others = sorted(values, key=lambda name: -len(values[name]))
    across, further = others[:1], others[1:]
    lines = []
    for chosen in product(*(values[name] for name in further)):
        fixed = dict(zip(further, chosen, strict=True))
        lines += [f"  {name} {value:,}" for name, value in fixed.items()]
        if not across:
            lines += _column(cells, down, values[down])
            continue
        for start in range(0, len(values[across[0]]), MAX_COLUMNS):
            columns = values[across[0]][start : start + MAX_COLUMNS]
            lines += _grid(cells, (down, values[down]), (across[0], columns), fixed)
    return lines


def _key(values: Mapping[str, int]) -> frozenset[tuple[str, int]]:
    return frozenset(values.items())


def _cell(report: MemoryReport, point: SweepPoint, gpu: Gpu | None) -> str:
    mark = MARKS[verdict(report, point, gpu.usable_bytes)] if gpu else " "
    return f"{point.process_bytes / GIB:.2f}{mark}"


def _column(cells: Mapping[frozenset[tuple[str, int]], str], down: str, rows: Sequence[int]) -> list[str]:
    return [f"  {down}", *(f"  {value:>{len(down)},} {cells[_key({down: value})]:>9}".rstrip() for value in rows)]


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
