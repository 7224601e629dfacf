"""Figures as SVG in a web page: text stays text, colours follow the light or dark scheme, and notes are tooltips."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from qlora_cli.charts.canvas import REPRODUCIBLE_METADATA
from qlora_cli.charts.palette import DARK, LIGHT
from qlora_cli.visible import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMESPACE = re.compile(r"\{[^}]*\}")
FAMILY = re.compile(r"font-family: [^;]*;? ?")
LONG_NUMBER = re.compile(r"-?\d+\.\d{2,}")
COLORS = {color: f"var(--{name})" for name, color in asdict(LIGHT).items()}
HEX_COLOR = re.compile(r"#[0-9a-f]{6}\b")
HOVER_RADIUS = 5  # pixels around a point
Extent = float | tuple[float, float] | None
# The page contains all sizes of a chart, the widest first; the width that the chart gets decides which one is shown.
# A browser without container queries shows the medium one.
PAGE_CSS = f"""\
:root {{
  color-scheme: light dark;
  {LIGHT.css()}
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    {DARK.css()}
  }}
}}
.sizes {{ container-type: inline-size; }}
.drawn {{
  display: block; width: 100%; height: auto; overflow: visible;
  stroke-linejoin: round; font-variant-numeric: tabular-nums;
}}
.drawn.narrow, .drawn.wide {{ display: none; }}
.note {{ fill: transparent; stroke: transparent; }}
rect.note:hover {{ fill: var(--ink); fill-opacity: 0.08; }}
@container (max-width: 419.9px) {{ .drawn.narrow {{ display: block; }} .drawn.medium {{ display: none; }} }}
@container (min-width: 760px) {{ .drawn.wide {{ display: block; }} .drawn.wide + .drawn.medium {{ display: none; }} }}
"""


@dataclass(frozen=True)
class Note:
    """A tooltip of a point or area of a chart, in lines.

    `x` and `y` are in units of the axes: a value, the two ends of an interval, or None for the whole axis.
    """

    text: str
    x: Extent = None
    y: Extent = None


def embedded(figure: "Figure", name: str, notes: Sequence[Note], *, size: str, description: str) -> str:
    """Return the `<svg>` of a figure, drawn in the light palette.

    Args:
        figure: A figure with one `Axes`, to which the notes refer.
        name: A name that is unique on the page.
        notes: The notes; later ones are on top.
        size: The class of the element that names its size.
        description: A description for screen readers.
    """
    root = _parsed(figure, name)
    root.attrib = {
        "class": f"drawn {size}",
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": visible(description, is_end=False),
    }
    root.extend(_elements(figure, notes))
    return ElementTree.tostring(root, encoding="unicode")


def _parsed(figure: "Figure", name: str) -> ElementTree.Element:
    """Return the drawing as elements, without metadata, global styles and unused ids."""
    import matplotlib as mpl

    svg = StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # ids are made from the salt
        figure.savefig(svg, format="svg", metadata=REPRODUCIBLE_METADATA["svg"])
    root = ElementTree.fromstring(svg.getvalue())  # noqa: S314 - written by matplotlib, a line above
    for parent in list(root.iter()):
        for child in list(parent):
            if NAMESPACE.sub("", child.tag) in {"metadata", "style"}:
                parent.remove(child)
    for element in root.iter():
        element.tag = NAMESPACE.sub("", element.tag)
        element.attrib = {NAMESPACE.sub("", key): _for_page(key, value) for key, value in element.attrib.items()}
        element.text, element.tail = (element.text if element.tag == "text" else None), None
        if element.tag == "g":
            element.attrib.pop("id", None)
    return root


def _for_page(key: str, value: str) -> str:
    if key == "style":
        value = FAMILY.sub("", value)  # the page sets it
        return HEX_COLOR.sub(lambda match: COLORS[match[0]], value)
    if key == "d":
        value = " ".join(value.split()).replace(" L ", "L").replace(" M ", "M").replace("M ", "M")
    return value if key == "id" else LONG_NUMBER.sub(lambda match: f"{float(match[0]):.1f}", value)


def _elements(figure: "Figure", notes: Sequence[Note]) -> Iterator[ElementTree.Element]:
    """Yield invisible rectangles with the notes as their titles."""
    (axes,) = figure.axes
    frame = axes.bbox
    for note in notes:
        xs, ys = _ends(note.x, axes.get_xlim()), _ends(note.y, axes.get_ylim())
        (left, low), (right, high) = axes.transData.transform(list(zip(xs, ys, strict=True)))
        left, right = _hover_area(note.x, left, right, frame.x0, frame.x1)
        low, high = _hover_area(note.y, low, high, frame.y0, frame.y1)
        rectangle = {"x": left, "y": figure.bbox.height - high, "width": right - left, "height": high - low}
        attributes = {key: f"{value:.1f}" for key, value in rectangle.items()}
        element = ElementTree.Element("rect", {"class": "note", **attributes})
        title = ElementTree.SubElement(element, "title")
        title.text = "\n".join(visible(line, is_end=False) for line in note.text.split("\n"))
        yield element


def _ends(extent: Extent, limits: tuple[float, float]) -> tuple[float, float]:
    if extent is None:
        return limits
    return extent if isinstance(extent, tuple) else (extent, extent)


def _hover_area(extent: Extent, start: float, end: float, least: float, most: float) -> tuple[float, float]:
    """Return where a note is shown, in pixels: around a point, and within the axes."""
    radius = HOVER_RADIUS if isinstance(extent, int | float) else 0
    return min(max(start - radius, least), most), max(min(end + radius, most), least)
