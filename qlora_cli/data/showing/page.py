"""The page of `qlora inspect-data --html`: one file that needs nothing else, on paper, on a phone, and in ten years.

What stands in it is untrusted: jinja escapes it, what can't be seen is made visible, and no script can run.
"""

import base64
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from jinja2 import Environment, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from qlora_cli import __version__
from qlora_cli.data.feeding.data_report import DataReport, describe_mixture
from qlora_cli.visible import TextPart, line_ends, parts, visible
from qlora_cli.writing import PRIVATE_FILE, write_file

if TYPE_CHECKING:  # they import torch
    from qlora_cli.data.showing.inspection import Bar, DataInspection
    from qlora_cli.data.showing.preview import RowPreview, TokenPiece

TEMPLATE = "page.html.jinja"
MOST_PADDING = 3  # pad tokens in a row that are shown at once; more are folded
WITHOUT_TEXT = "∅"  # a token that is no text of its own
PIXEL_RATIO = 2  # of the pictures, for dense displays
POINTS_PER_INCH, CSS_PIXELS_PER_INCH = 72, 96
FONT_CSS_PIXELS = 12
WIDE_COUNTS = 1000  # times, from the lowest to the highest bar: above, a linear axis shows only the high ones
BAR_GAP = 0.04
NEAR = 0.03  # times the width of the bars, where the line stands that can't be drawn to scale
FAR = 1.4  # times the width of the bars: a longest length beyond is named, not drawn to scale
FAR_DOUBLINGS = 4  # the same for doubling bars


@dataclass(frozen=True)
class Cell:
    """A figure, and what is to say about it; None where it makes no sense."""

    number: int | None
    remark: str = ""


@dataclass(frozen=True)
class Token:
    """A piece as the page shows it."""

    ids: tuple[int, ...]
    classes: str
    parts: tuple[TextPart, ...]


@dataclass(frozen=True)
class TokenRun:
    """Tokens next to one another, folded if there is nothing to see in them."""

    is_folded: bool
    tokens: tuple[Token, ...]


@dataclass(frozen=True, kw_only=True)
class Colors:
    """Of a picture that stands on a light page, or on a dark one. The page's own are in its template."""

    ink: str
    muted: str
    grid: str
    bar: str
    beyond: str


@dataclass(frozen=True, kw_only=True)
class Screen:
    """A kind of screen that a picture is drawn for. Sizes in CSS pixels."""

    media: str
    width: int
    height: int
    num_ticks: int
    colors: Colors


LIGHT = Colors(ink="#1f2328", muted="#5c6670", grid="#e3e6e9", bar="#2f7f8f", beyond="#d9622b")
DARK = Colors(ink="#e4e7ea", muted="#9aa4ae", grid="#31373d", bar="#4fa3b3", beyond="#ee8a58")
PHONE = "(max-width: 30rem)"
NIGHT = "(prefers-color-scheme: dark)"
# The first that fits is shown: a wide one shrunk to a phone could not be read.
SCREENS = (
    Screen(media=f"{PHONE} and {NIGHT}", width=328, height=230, num_ticks=4, colors=DARK),
    Screen(media=PHONE, width=328, height=230, num_ticks=4, colors=LIGHT),
    Screen(media=NIGHT, width=720, height=280, num_ticks=9, colors=DARK),
    Screen(media="all", width=720, height=280, num_ticks=9, colors=LIGHT),
)


def write_page(inspection: "DataInspection", path: Path, *, model: str) -> None:
    """Write the page into `path`, complete or not at all. `model` is whose tokenizer it was."""
    write_file(path, render_page(inspection, model=model), mode=PRIVATE_FILE)


def render_page(inspection: "DataInspection", *, model: str) -> str:
    """Return the page."""
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
        pictures=draw_lengths(inspection.lengths, inspection.max_length, inspection.longest_uncut_tokens),
        description=describe_lengths(inspection),
        previews=[(row, runs_of(row)) for row in inspection.previews],
    )


def figures_of(reports: Sequence[DataReport]) -> list[list[tuple[str, list[Cell]]]]:
    """Return groups of names with a figure for each of `reports`: what is trained, and maybe what is held out."""
    columns = [_figures(report, is_evaluation=place > 0) for place, report in enumerate(reports)]
    return [
        [
            (rows[0][0], [cell for _, cell in rows])
            for rows in zip(*groups, strict=True)
            if any(cell.number is not None for _, cell in rows)
        ]
        for groups in zip(*columns, strict=True)
    ]


def _figures(report: DataReport, *, is_evaluation: bool) -> list[list[tuple[str, Cell]]]:
    supervised, lost = report.supervised_tokens, report.supervised_tokens_lost
    return [
        [("Rows read", Cell(report.rows)), ("Rows fed", Cell(report.rows_trained))],
        [
            ("Tokens fed", Cell(report.tokens)),
            ("Supervised tokens", Cell(supervised, _share(supervised, report.tokens))),
        ],
        [
            ("Rows truncated", Cell(report.truncated_rows)),
            ("Rows dropped as too long", Cell(report.dropped_rows)),
            ("Tokens lost", Cell(report.tokens_lost, _share(report.tokens_lost, report.tokens + report.tokens_lost))),
            ("Supervised tokens lost", Cell(lost, _share(lost, supervised + lost))),
        ],
        [
            ("Rows without supervision", Cell(report.rows_without_supervision)),
            ("Duplicate rows", Cell(report.duplicate_rows, _if_any(report.duplicates_dropped, "dropped"))),
            ("Bad rows", Cell(report.bad_rows, _if_any(report.empty_answers, "empty"))),
            ("Rows held out", Cell(None if is_evaluation else report.held_out_rows)),
            ("Near-duplicates of trained rows", Cell(report.near_duplicate_rows)),
            ("Groups", Cell(report.groups)),
        ],
    ]


def _share(part: int, whole: int) -> str:
    return _percent(part / whole) if part else ""


def _percent(share: float) -> str:
    percent = f"{100 * share:.1f} %"
    return "< 0.1 %" if share and percent == "0.0 %" else percent


def _if_any(number: int, what: str) -> str:
    return f"{number:,} {what}" if number else ""


def runs_of(row: "RowPreview") -> list[TokenRun]:
    """Return a row's tokens, more than a few pad tokens next to one another folded."""
    runs = []
    for is_padding, pieces in groupby(_tokens(row.pieces), key=lambda pair: pair[0].is_padding):
        tokens = tuple(token for _, token in pieces)
        runs.append(TokenRun(is_folded=is_padding and len(tokens) > MOST_PADDING, tokens=tokens))
    return runs


def _tokens(pieces: Sequence["TokenPiece"]) -> Iterator[tuple["TokenPiece", Token]]:
    for piece, is_end in zip(pieces, line_ends(pieces), strict=True):
        kinds = {"trained": piece.is_trained, "special": piece.is_special, "padding": piece.is_padding}
        shown = tuple(parts(piece.text, is_end=is_end)) or (TextPart(WITHOUT_TEXT, is_sign=True),)
        classes = " ".join(kind for kind, is_so in kinds.items() if is_so)
        yield piece, Token(ids=piece.ids, classes=classes, parts=shown)


def describe_lengths(inspection: "DataInspection") -> str:
    """Return what is seen in the histogram, for those who don't see it."""
    tallest = max(inspection.lengths, key=lambda bar: bar.rows)
    num_rows = sum(bar.rows for bar in inspection.lengths)
    longer = "longer rows are in another colour" if _has_longer(inspection) else "no row is longer"
    return (
        f"Histogram of the lengths of {num_rows:,} rows. The tallest bar: {tallest.rows:,} rows of {tallest.first:,} "
        f"to {tallest.last:,} tokens. The longest row has {inspection.longest_uncut_tokens:,} tokens. A line marks "
        f"the max length, {inspection.max_length:,} tokens; {longer}."
    )


def _has_longer(inspection: "DataInspection") -> bool:
    return inspection.longest_uncut_tokens > inspection.max_length


def draw_lengths(bars: Sequence["Bar"], max_length: int, longest: int) -> list[tuple[Screen, str]]:
    """Return the histogram for each kind of screen, as a data URI."""
    return [(screen, _as_uri(screen, bars, max_length, longest)) for screen in SCREENS]


def _as_uri(screen: Screen, bars: Sequence["Bar"], max_length: int, longest: int) -> str:
    png = io.BytesIO()
    with mpl.rc_context(style_of(screen)):
        # Without the version of matplotlib: equal data, equal page.
        draw(screen, bars, max_length, longest).savefig(
            png, format="png", transparent=True, metadata={"Software": None}
        )
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode("ascii")


def style_of(screen: Screen) -> dict[Any, Any]:
    """Return settings of matplotlib, all of them: whatever the machine's own matplotlibrc says."""
    return {
        **mpl.rcParamsDefault,
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": FONT_CSS_PIXELS * POINTS_PER_INCH / CSS_PIXELS_PER_INCH,
        "text.color": screen.colors.ink,
        "axes.edgecolor": screen.colors.grid,
        "axes.labelcolor": screen.colors.muted,
        "xtick.color": screen.colors.muted,
        "ytick.color": screen.colors.muted,
    }


def draw(screen: Screen, bars: Sequence["Bar"], max_length: int, longest: int) -> Figure:
    """Return the histogram; every bar is one wide, whatever lengths it stands for."""
    size = (screen.width / CSS_PIXELS_PER_INCH, screen.height / CSS_PIXELS_PER_INCH)
    figure = Figure(figsize=size, dpi=CSS_PIXELS_PER_INCH * PIXEL_RATIO, layout="constrained")
    axes = figure.subplots()
    limit = place_of(max_length, bars)
    for place, bar in enumerate(bars):
        _draw_bar(axes, place, bar.rows, limit if longest > max_length else math.inf, screen.colors)
    _set_scales(axes, screen, bars)
    _draw_limit(axes, limit, _farthest(bars), max_length, screen.colors)
    return figure


def place_of(length: int, bars: Sequence["Bar"]) -> float:
    """Return where on the axis rows of up to `length` tokens end."""
    for place, bar in enumerate(bars):
        if length <= bar.last:
            return place + max(0.0, (length - bar.first + 1) / _width(bar))  # no bar has only shorter rows
    if _is_doubling(bars):
        return len(bars) + math.log2(length / bars[-1].last)
    return len(bars) + (length - bars[-1].last) / _width(bars[-1])


def _is_doubling(bars: Sequence["Bar"]) -> bool:
    return _width(bars[-1]) > _width(bars[0])


def _width(bar: "Bar") -> int:
    return bar.last - bar.first + 1


def _farthest(bars: Sequence["Bar"]) -> float:
    """Return up to where the axis may reach without making the bars small."""
    return len(bars) + FAR_DOUBLINGS if _is_doubling(bars) else len(bars) * FAR


def _draw_bar(axes: Axes, place: int, rows: int, limit: float, colors: Colors) -> None:
    left, right = place + BAR_GAP, place + 1 - BAR_GAP
    for start, end, color in ((left, min(right, limit), colors.bar), (max(left, limit), right, colors.beyond)):
        if end > start:
            axes.bar(start, rows, width=end - start, align="edge", color=color, linewidth=0)


def _set_scales(axes: Axes, screen: Screen, bars: Sequence["Bar"]) -> None:
    ticks = _ticks(bars, screen.num_ticks)
    axes.set_xticks(list(ticks), [f"{edge:,}" for edge in ticks.values()])
    axes.set_xlim(0, len(bars))
    axes.set(xlabel="tokens of a row", ylabel="rows")
    counts = [bar.rows for bar in bars if bar.rows]
    if max(counts) > WIDE_COUNTS * min(counts):
        axes.set(yscale="log", ylabel="rows, logarithmic")
        axes.set_ylim(bottom=0.5)
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rows, _: f"{rows:,.0f}"))
    axes.grid(axis="y", color=screen.colors.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _ticks(bars: Sequence["Bar"], most: int) -> dict[int, int]:
    """Return the lengths to write between bars, by their places: multiples of one number, or of every so many bars."""
    edges = [bars[0].first - 1, *(bar.last for bar in bars)]
    step = math.ceil(len(edges) / most)
    if _is_doubling(bars):
        return dict(list(enumerate(edges))[::step])
    return {place: edge for place, edge in enumerate(edges) if edge % (step * _width(bars[0])) == 0}


def _draw_limit(axes: Axes, limit: float, farthest: float, max_length: int, colors: Colors) -> None:
    """Draw the max length as a line; at the right edge and so labelled if it lies far beyond the longest row."""
    is_far = limit > farthest
    end = axes.get_xlim()[1]
    at = (1 + NEAR) * end if is_far else limit
    right = max(end, at) + BAR_GAP
    axes.set_xlim(0, right)
    axes.axvline(at, linestyle=(0, (4, 3)), linewidth=1, color=colors.ink)
    axes.annotate(
        f"max length {max_length:,}{' →' if is_far else ''}",
        xy=(at, 1),
        xytext=(0, 4),
        xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
        ha="right" if at > right / 2 else "left",
    )
