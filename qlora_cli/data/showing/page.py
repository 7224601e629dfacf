"""Write the page of `qlora inspect-data --html`: a self-contained file that also works on paper and on a phone.

The text of rows is untrusted: jinja escapes it, invisible characters are made visible, and no script can run.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from qlora_cli import __version__
from qlora_cli.charts.canvas import ChartSize, drawing_style
from qlora_cli.charts.histogram import Histogram, LimitLine, embedded_histogram
from qlora_cli.charts.page_svg import PAGE_CSS
from qlora_cli.data.feeding.data_report import DataReport, describe_mixture
from qlora_cli.units import counted
from qlora_cli.visible import TextPart, line_ends, parts, visible
from qlora_cli.writing import PRIVATE_FILE, write_file

if TYPE_CHECKING:  # they import torch
    from qlora_cli.data.showing.inspection import Bar, DataInspection
    from qlora_cli.data.showing.preview import RowPreview, TokenPiece

TEMPLATE = "page.html.jinja"
MAX_SHOWN_PADDING = 3  # consecutive pad tokens; more are folded
NO_TEXT = "∅"  # shown for a token that decodes to no text
SIZES = (
    ChartSize(name="medium", width=560, height=260, num_ticks=7),
    ChartSize(name="narrow", width=340, height=240, num_ticks=4),
)
MAX_AXIS_RATIO = 1.4  # times the width of all bars: a max length beyond that is named, not drawn to scale
MAX_AXIS_DOUBLINGS = 4  # the same for bars of doubling width


@dataclass(frozen=True)
class Cell:
    """A number with a remark; None where it does not apply."""

    number: int | None
    remark: str = ""


@dataclass(frozen=True)
class Token:
    """A token as the page shows it."""

    ids: tuple[int, ...]
    classes: str
    parts: tuple[TextPart, ...]


@dataclass(frozen=True)
class TokenRun:
    """Consecutive tokens; long runs of padding are folded."""

    is_folded: bool
    tokens: tuple[Token, ...]


def write_page(inspection: "DataInspection", path: Path, *, model: str) -> None:
    """Write the page to `path`, complete or not at all; `model` is the name of the tokenizer's model."""
    write_file(path, render_page(inspection, model=model), mode=PRIVATE_FILE)


def render_page(inspection: "DataInspection", *, model: str) -> str:
    """Return the page as HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"visible": visible, "count": "{:,}".format, "share": _percent}
    template = environment.from_string(resources.files("qlora_cli.data.showing").joinpath(TEMPLATE).read_text("utf-8"))
    reports = [inspection.data, *([inspection.evaluation] if inspection.evaluation else [])]
    return template.render(
        inspection=inspection,
        mixture=describe_mixture(inspection.data),
        model=model,
        version=__version__,
        figures=figures_of(reports),
        lengths=draw_lengths(inspection),
        chart_css=Markup(PAGE_CSS),  # noqa: S704 - ours
        previews=[(row, runs_of(row)) for row in inspection.previews],
    )


def figures_of(reports: Sequence[DataReport]) -> list[list[tuple[str, list[Cell]]]]:
    """Return groups of named figures, with a cell for each report: on trained rows, and on held-out ones if any."""
    columns = [_figures(report, is_evaluation=index > 0) for index, report in enumerate(reports)]
    return [
        [
            (rows[0][0], [cell for _, cell in rows])
            for rows in zip(*groups, strict=True)
            if any(cell.number is not None for _, cell in rows)
        ]
        for groups in zip(*columns, strict=True)
    ]


def _figures(report: DataReport, *, is_evaluation: bool) -> list[list[tuple[str, Cell]]]:
    trained, lost = report.supervised_tokens, report.supervised_tokens_lost
    return [
        [("Rows read", Cell(report.rows)), ("Rows fed", Cell(report.rows_trained))],
        [
            ("Tokens fed", Cell(report.tokens)),
            ("Trained tokens", Cell(trained, _share(trained, report.tokens))),
        ],
        [
            ("Rows truncated", Cell(report.truncated_rows)),
            ("Rows dropped as too long", Cell(report.dropped_rows)),
            ("Tokens lost", Cell(report.tokens_lost, _share(report.tokens_lost, report.tokens + report.tokens_lost))),
            ("Trained tokens lost", Cell(lost, _share(lost, trained + lost))),
        ],
        [
            ("Rows without trained tokens", Cell(report.rows_without_supervision)),
            ("Duplicate rows", Cell(report.duplicate_rows, _if_any(report.duplicates_dropped, "dropped"))),
            ("Bad rows", Cell(report.bad_rows, _if_any(report.empty_answers, "empty"))),
            ("Rows held out", Cell(None if is_evaluation else report.held_out_rows)),
            ("Near-duplicates of trained rows", Cell(report.near_duplicate_rows)),
            ("Rows with a wanted answer", Cell(report.desirable_rows)),
            ("Groups", Cell(report.groups)),
        ],
    ]


def _share(part: int, whole: int) -> str:
    return _percent(part / whole) if part else ""


def _percent(share: float) -> str:
    percent = f"{100 * share:.1f} %"
    return "< 0.1 %" if share and percent == "0.0 %" else percent


def _if_any(number: int, label: str) -> str:
    return f"{number:,} {label}" if number else ""


def runs_of(row: "RowPreview") -> list[TokenRun]:
    """Return a row's tokens in runs; a run of more than a few pad tokens is folded."""
    runs = []
    for is_padding, pieces in groupby(_tokens(row.pieces), key=lambda pair: pair[0].is_padding):
        tokens = tuple(token for _, token in pieces)
        runs.append(TokenRun(is_folded=is_padding and len(tokens) > MAX_SHOWN_PADDING, tokens=tokens))
    return runs


def _tokens(pieces: Sequence["TokenPiece"]) -> Iterator[tuple["TokenPiece", Token]]:
    for piece, is_end in zip(pieces, line_ends(pieces), strict=True):
        flags = {"trained": piece.is_trained, "special": piece.is_special, "padding": piece.is_padding}
        shown = tuple(parts(piece.text, is_end=is_end)) or (TextPart(NO_TEXT, is_sign=True),)
        classes = " ".join(name for name, is_set in flags.items() if is_set)
        yield piece, Token(ids=piece.ids, classes=classes, parts=shown)


def describe_lengths(inspection: "DataInspection") -> str:
    """Return the alternative text of the histogram."""
    tallest = max(inspection.lengths, key=lambda bar: bar.rows)
    num_rows = sum(bar.rows for bar in inspection.lengths)
    longer = "longer rows are in another colour" if _has_longer(inspection) else "no row is longer"
    return (
        f"Histogram of the lengths of {counted(num_rows, 'row')}. "
        f"The tallest bar: {counted(tallest.rows, 'row')} of {tallest.first:,} "
        f"to {tallest.last:,} tokens. The longest row has {inspection.longest_uncut_tokens:,} tokens. A line marks "
        f"the max length, {inspection.max_length:,} tokens; {longer}."
    )


def _has_longer(inspection: "DataInspection") -> bool:
    return inspection.longest_uncut_tokens > inspection.max_length


def lengths_chart(inspection: "DataInspection") -> Histogram:
    """Return the histogram of row lengths before truncation."""
    bars, max_length = inspection.lengths, inspection.max_length
    limit = position_of(max_length, bars)
    return Histogram(
        edges=(bars[0].first - 1, *(bar.last for bar in bars)),
        counts=tuple(bar.rows for bar in bars),
        limit=LimitLine(
            position=limit,
            label=f"max length {max_length:,}",
            is_far=limit > _max_position(bars),
            is_exceeded=_has_longer(inspection),
        ),
        x_name="tokens of a row",
        y_name="rows",
        notes=tuple(f"{bar.first:,} to {bar.last:,} tokens: {counted(bar.rows, 'row')}" for bar in bars),
    )


def draw_lengths(inspection: "DataInspection") -> Markup:
    """Return the histogram of row lengths as SVG."""
    with drawing_style():
        svg = embedded_histogram(lengths_chart(inspection), "lengths", SIZES, description=describe_lengths(inspection))
    return Markup(svg)  # noqa: S704 - its text is escaped


def position_of(length: int, bars: Sequence["Bar"]) -> float:
    """Return the position on the axis, in bars, where rows of up to `length` tokens end."""
    for index, bar in enumerate(bars):
        if length <= bar.last:
            return index + max(0.0, (length - bar.first + 1) / _width(bar))  # 0 if all rows are longer
    if _is_doubling(bars):
        return len(bars) + math.log2(length / bars[-1].last)
    return len(bars) + (length - bars[-1].last) / _width(bars[-1])


def _is_doubling(bars: Sequence["Bar"]) -> bool:
    return _width(bars[-1]) > _width(bars[0])


def _width(bar: "Bar") -> int:
    return bar.last - bar.first + 1


def _max_position(bars: Sequence["Bar"]) -> float:
    """Return how far the axis may reach, in bars, before they become too narrow."""
    return len(bars) + MAX_AXIS_DOUBLINGS if _is_doubling(bars) else len(bars) * MAX_AXIS_RATIO
