"""A figure embedded in a page: text as text, in the colours of the page, without effect on the rest of it."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import pytest

from qlora_cli.charts.canvas import drawing_style
from qlora_cli.charts.line_chart import Mark, MarkLook, embedded_line_chart
from qlora_cli.charts.page_svg import PAGE_CSS
from qlora_cli.charts.palette import DARK, LIGHT, Palette
from tests.unit.charts.svg import notes, parse_drawings, texts
from tests.unit.charts.test_line_chart import LARGE, SMALL, embed, with_line

HOSTILE = (
    "<script>alert(1)</script>",
    "</title></svg>",
    "&amp;\"'`",
    "\u202egnp",
    "nul \0 esc \x1b",
    "lone \ud800",
    "$x_1$",
)
CHART = replace(
    with_line([(0, 0.1), (5, 0.9)]), marks=(Mark(MarkLook("second", 12, is_ring=True), 5, 0.9, "the best"),)
)


def test_texts_are_text_elements_in_the_font_of_the_page() -> None:
    (drawing,) = parse_drawings(embed(CHART))
    assert "step" in texts(drawing)
    svg = embed(CHART)
    assert "DejaVu" not in svg
    assert "font-size: 12px" in svg


def test_colours_are_variables_of_the_page_in_light_and_dark() -> None:
    svg = embed(CHART)
    assert set(re.findall(r"var\(--(\w+)\)", svg)) >= {"first", "second", "page", "line", "muted"}
    assert not re.search(r"#[0-9a-fA-F]{6}\b", svg)
    for palette in (LIGHT, DARK):
        assert palette.css() in PAGE_CSS
        assert len(set(vars(palette).values())) == len(Palette.__dataclass_fields__)


def test_a_page_can_contain_many_charts_without_equal_ids_styles_or_metadata() -> None:
    with drawing_style():
        svg = "".join(embedded_line_chart(CHART, name, (LARGE, SMALL), description=name) for name in ("loss", "speed"))
    ids = re.findall(r' id="([^"]*)"', svg)
    assert ids
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'href="#([^"]*)"', svg)) | set(re.findall(r"url\(#([^)]*)\)", svg)) == set(ids)
    for unwanted in ("<style", "<metadata", "xmlns", "<?xml", "<!DOCTYPE"):
        assert unwanted not in svg
    assert [drawing.attrib["class"] for drawing in parse_drawings(svg)] == 2 * ["drawn wide", "drawn narrow"]


def test_equal_charts_have_equal_bytes() -> None:
    assert embed(CHART) == embed(CHART)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_escaped_and_visible(text: str) -> None:
    chart = replace(CHART, x_name="step", marks=(Mark(MarkLook("good", 6), 1, 0.5, f"first\n{text}"),))
    with drawing_style():
        svg = embedded_line_chart(chart, "loss", (SMALL,), description=text)
    assert "<script" not in svg
    for character in ("\u202e", "\0", "\x1b", "\ud800"):
        assert character not in svg
    (drawing,) = parse_drawings(svg)
    (note,) = notes(drawing)
    assert note.startswith("first\n")
    if text.isprintable():
        assert note == f"first\n{text}"
        assert drawing.attrib["aria-label"] == text


def test_matplotlib_settings_are_unchanged() -> None:
    before = dict(mpl.rcParams)
    embed(CHART)
    assert dict(mpl.rcParams) == before


def test_a_machine_without_a_font_cache_or_a_home_draws_without_output(tmp_path: Path) -> None:
    code = (
        "import sys; from tests.unit.charts.test_line_chart import EMPTY, embed; "
        "print(len(embed(EMPTY)), 'matplotlib.pyplot' in sys.modules)"  # it looks for a window
    )
    home = tmp_path / "home"
    home.write_text("no directory")
    environment = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home), "XDG_CONFIG_HOME": str(home)}
    environment.pop("MPLCONFIGDIR", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    length, has_chosen_a_backend = done.stdout.split()
    assert int(length) > 1000
    assert has_chosen_a_backend == "False"


def test_nothing_is_imported_until_something_is_drawn() -> None:
    code = "import sys, qlora_cli.charts.line_chart, qlora_cli.runs.report.run_page;print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
