"""The table of `qlora presets`."""

from collections.abc import Sequence
from itertools import groupby

from rich.text import Text

from qlora_cli.cli.console import console
from qlora_cli.settings.files.preset_files import Preset
from qlora_cli.units import format_bytes

Row = tuple[str, ...]
HEADINGS = ("preset", "card", "tokens a row", "needs", "model")
GAP, INDENTATION = "  ", "  "


def render_presets(presets: Sequence[Preset]) -> None:
    """Print a line for each preset; in a narrow window, below a line for its model."""
    out = console()
    for line in preset_lines(presets, out.width if out.is_terminal else None):
        out.print(line, soft_wrap=True)


def preset_lines(presets: Sequence[Preset], width: int | None) -> list[Text]:
    """Return a table with headings in at most `width` columns, in which no name is broken."""
    rows = [_row(one) for one in presets]
    widths = [max(map(len, column)) for column in zip(HEADINGS, *rows, strict=True)]
    lines = [_line(row, widths) for row in (HEADINGS, *rows)]
    if width is not None and max(map(len, lines)) > width:
        lines = [_line(HEADINGS[:-1], widths, INDENTATION)]
        for model, of_model in groupby(rows, key=lambda row: row[-1]):
            lines += [Text(model), *(_line(row[:-1], widths, INDENTATION) for row in of_model)]
    lines[0].stylize("bold")
    return lines


def _row(preset: Preset) -> Row:
    needs = format_bytes(preset.predicted_bytes)
    return preset.name, f"{preset.card_gb} GB", f"{preset.max_length_tokens:,}", needs, preset.model


def _line(row: Row, widths: Sequence[int], indentation: str = "") -> Text:
    name, *figures = row[: len(HEADINGS) - 1]
    cells = [f"{name:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(figures, widths[1:], strict=False))]
    return Text(indentation + GAP.join([*cells, *row[len(HEADINGS) - 1 :]]))
