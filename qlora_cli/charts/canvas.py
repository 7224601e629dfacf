"""An empty figure and its files, the same on every machine, independent of its matplotlibrc.

matplotlib is imported only when something is drawn: it takes half a second, which other commands do not pay.
"""

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_cli.charts.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FONT_PIXELS = 12
PIXELS_PER_INCH = 72  # of the figures on a page: as in SVG, a point is a pixel, and the page scales them
REPRODUCIBLE_METADATA: dict[str, dict[str, None]] = {  # without what makes files of equal pictures differ
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
TOP, RIGHT, BOTTOM, LEFT = 8, 12, 42, 12  # pixels around the axes of a page's figure, on the left next to labels
TICK_FROM_END = 3  # pixels, at least
PIXELS_PER_CHARACTER = 7.2  # of a label, at most: digits are that wide
LABEL_PAD = 8  # pixels between the axes and their labels


@dataclass(frozen=True, kw_only=True)
class ChartSize:
    """A size of a figure on a page, in CSS pixels, including axes and labels. The page scales it slightly.

    `name` is the class by which the page shows and hides it; `num_ticks` is how many labels fit below the axis.
    """

    name: str
    width: int
    height: int
    num_ticks: int


@contextmanager
def drawing_style(font_size: float = FONT_PIXELS) -> Iterator[None]:
    """Let matplotlib draw in our style, without messages on stderr that are useless to users, as of its caches."""
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import matplotlib as mpl  # it looks for its caches

        # Setting the default of `backend` would choose one, for which pyplot and perhaps a GUI toolkit are imported.
        defaults: dict[Any, Any] = {name: value for name, value in mpl.rcParamsDefault.items() if name != "backend"}
        with mpl.rc_context({**defaults, **_settings(font_size)}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # it is drawn as a box
            yield
    finally:
        log.setLevel(level)


def _settings(font_size: float) -> dict[Any, Any]:
    return {
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": font_size,
        "text.color": LIGHT.ink,
        "text.parse_math": False,  # a name may contain dollar signs
        "axes.edgecolor": LIGHT.line,
        "axes.labelcolor": LIGHT.muted,
        "xtick.color": LIGHT.muted,
        "ytick.color": LIGHT.muted,
        # A reduced frame: two edges, no ticks, and faint grid lines where a chart asks for them.
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "xtick.major.pad": LABEL_PAD,
        "ytick.major.pad": LABEL_PAD,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": LIGHT.line,
        "grid.linewidth": 1,
        "path.simplify": False,  # a point between two gaps would disappear
        "svg.hashsalt": "qlora",
    }


def picture_of(figure: "Figure", file_format: str) -> bytes:
    """Return a figure as `png`, `svg` or `pdf`: the same bytes for the same figure and version of matplotlib."""
    picture = io.BytesIO()
    figure.savefig(picture, format=file_format, metadata=REPRODUCIBLE_METADATA[file_format])
    return picture.getvalue()


def page_figure(
    size: ChartSize, *, left_labels: Sequence[str], low_labels: Sequence[str], left: int = LEFT, top: int = TOP
) -> "tuple[Figure, Axes]":
    """Return a figure for a page and its axes, with space for the labels on the left and for the last label below."""
    from matplotlib.figure import Figure

    left += round(PIXELS_PER_CHARACTER * max(map(len, left_labels), default=0))
    right = max(RIGHT, round(PIXELS_PER_CHARACTER * len(low_labels[-1] if low_labels else "") / 2 - TICK_FROM_END))
    width, height = size.width - left - right, size.height - top - BOTTOM
    figure = Figure(figsize=(size.width / PIXELS_PER_INCH, size.height / PIXELS_PER_INCH), dpi=PIXELS_PER_INCH)
    return figure, figure.add_axes((left / size.width, BOTTOM / size.height, width / size.width, height / size.height))
