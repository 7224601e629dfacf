"""Figures as SVG in a web page: text stays text, colours follow the light or dark scheme, and notes are tooltips."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from qlora_cli.charts.canvas import SAME_FILES
from qlora_cli.charts.palette import DARK, LIGHT
from qlora_cli.visible import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMESPACE = re.compile(r"\{[^}]*\}")
FAMILY = re.compile(r"font-family: [^;]*;? ?")
LONG_NUMBER = re.compile(r"-?\d+\.\d{2,}")
COLORS = {color: f"var(--{name})" for name, color in asdict(LIGHT).items()}
HEX_COLOR = re.compile(r"#[0-9a-f]{6}\b")
POINTED_AT = 5  # pixels around a point
Place = float | tuple[float, float] | None
# The sizes of a chart stand in the page together, the widest first; which of them is seen depends on the width that
# the chart gets. A browser that knows no container queries shows the medium one.
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

    `x` and `y` are in units of the axes: a value, the two ends of a stretch, or None for all of the axis.
    """

    text: str
    x: Place = None
    y: Place = None


def embedded(figure: "Figure", name: str, notes: Sequence[Note], *, size: str, description: str) -> str:
    """Return the `<svg>` of a figure, drawn in the light palette.

    Args:
        figure: A figure with one pair of axes, which the notes refer to.
        name: A name that is unique on the page.
        notes: The notes; later ones are on top.
        size: A class of the element.
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
        figure.savefig(svg, format="svg", metadata=SAME_FILES["svg"])
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
        value = FAMILY.sub("", value)  # it is the page's
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
        left, right = _reached(note.x, left, right, frame.x0, frame.x1)
        low, high = _reached(note.y, low, high, frame.y0, frame.y1)
        place = {"x": left, "y": figure.bbox.height - high, "width": right - left, "height": high - low}
        attributes = {key: f"{value:.1f}" for key, value in place.items()}
        element = ElementTree.Element("rect", {"class": "note", **attributes})
        title = ElementTree.SubElement(element, "title")
        title.text = "\n".join(visible(line, is_end=False) for line in note.text.split("\n"))
        yield element


def _ends(place: Place, limits: tuple[float, float]) -> tuple[float, float]:
    if place is None:
        return limits
    return place if isinstance(place, tuple) else (place, place)


def _reached(place: Place, start: float, end: float, least: float, most: float) -> tuple[float, float]:
    """Return the extent of a note in pixels: around a point, and within the axes."""
    around = POINTED_AT if isinstance(place, int | float) else 0
    return min(max(start - around, least), most), max(min(end + around, most), least)
