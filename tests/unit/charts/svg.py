"""The SVG in a page, parsed again."""

import re
from xml.etree.ElementTree import Element, fromstring

COMMAND = re.compile(r"([ML])(-?[\d.]+) (-?[\d.]+)")


def parse_drawings(svg: str) -> list[Element]:
    """Return the drawings of a chart, one per size."""
    return fromstring(f"<all>{svg}</all>").findall("svg")  # noqa: S314 - ours


def strokes(drawing: Element, color: str, width: str) -> list[list[tuple[float, float]]]:
    """Return the unbroken lines of a colour and width, in pixels: x, and y from the top."""
    lines: list[list[tuple[float, float]]] = []
    for path in drawing.iter("path"):
        style = path.attrib.get("style", "")
        if f"stroke: var(--{color})" in style and f"stroke-width: {width};" in f"{style};":
            for command, x, y in COMMAND.findall(path.attrib["d"]):
                if command == "M":
                    lines.append([])
                lines[-1].append((float(x), float(y)))
    return lines


def texts(drawing: Element) -> list[str]:
    """Return the visible texts of a drawing."""
    return [text.text or "" for text in drawing.iter("text")]


def notes(drawing: Element) -> list[str]:
    """Return the texts that a browser shows when it points at parts of a drawing."""
    return [title.text or "" for title in drawing.iter("title")]
