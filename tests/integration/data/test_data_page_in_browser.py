"""The page of `qlora inspect-data --html` in a real browser: requests, width, and visible contents."""

import re
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qlora_cli.charts.palette import DARK, LIGHT
from qlora_cli.data.showing.page import write_page
from qlora_cli.visible import visible
from tests.support.processes.browser import DARK_SCHEME, Browser, find_browser, frame, share_of, with_script
from tests.unit.data_rows.test_data_page import INSPECTION

# What a copy of the page writes into itself, or into the page that frames it.
FACTS = """<script>addEventListener("load", () => {
  const root = document.documentElement;
  const seen = Array.from(document.querySelectorAll("svg.drawn")).filter(svg => svg.getClientRects().length);
  window.top.document.body.dataset.facts = JSON.stringify({
    sizes: seen.map(svg => svg.classList[1]), width: seen[0].getBoundingClientRect().width,
    labels: Array.from(seen[0].querySelectorAll("text"), text => [text.getBoundingClientRect().left,
      text.getBoundingClientRect().right]),
    fontPixels: 12 * seen[0].getScreenCTM().a,
    scrollWidth: root.scrollWidth, innerWidth, rows: document.querySelectorAll("details.sample").length,
    trained: Array.from(document.querySelectorAll(".row .trained"), span => span.textContent),
    scripts: document.querySelectorAll("main script").length,
  });
});</script>"""
PHONE_WIDTH, PHONE_HEIGHT = 360, 800


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    browser = find_browser(tmp_path_factory.mktemp("browser"))
    write_page(INSPECTION, browser.page, model="Qwen/Qwen3-0.6B")
    return browser


def num_colors(pixels: NDArray[np.int16]) -> int:
    return len(np.unique(pixels.astype(int) @ [256**2, 256, 1]))


def trained_colors(page: Path) -> list[str]:
    """Return the background of trained text in light and dark."""
    colors = re.findall(r"--trained: (#\w+);", page.read_text("utf-8"))
    assert len(colors) == 2
    return colors


def check_facts(facts: dict[str, Any], size: str) -> None:
    assert facts["scrollWidth"] <= facts["innerWidth"]
    assert facts["sizes"] == [size]
    assert facts["width"] > 0.85 * min(facts["innerWidth"], 784)
    assert 9 <= facts["fontPixels"] <= 16
    assert facts["labels"]
    assert all(left >= 0 and right <= facts["innerWidth"] for left, right in facts["labels"])
    assert facts["rows"] == len(INSPECTION.previews)
    pieces = [piece for row in INSPECTION.previews for piece in row.pieces]
    assert facts["trained"] == [visible(piece.text) for piece in pieces if piece.is_trained]
    assert facts["scripts"] == 0


def test_rows_trained_text_and_the_histogram_are_visible(browser: Browser) -> None:
    copy = browser.folder / "copy.html"
    copy.write_text(with_script(browser.page, FACTS), "utf-8")
    facts = browser.facts(copy, "--window-size=1200,1600")
    assert facts["innerWidth"] == 1200
    check_facts(facts, "medium")


def test_a_phone_scrolls_in_one_direction_and_gets_its_own_drawing(browser: Browser) -> None:
    framed = browser.folder / "framed.html"
    framed.write_text(
        frame(f'srcdoc="{escape(with_script(browser.page, FACTS))}"', PHONE_WIDTH, PHONE_HEIGHT), "utf-8"
    )
    facts = browser.facts(framed)
    assert facts["innerWidth"] == PHONE_WIDTH
    check_facts(facts, "narrow")


def test_the_histogram_and_trained_text_are_visible_in_light_and_dark_mode(browser: Browser) -> None:
    light, dark = trained_colors(browser.page)
    path = browser.folder / "short.html"  # rows begin within the window, a long one first
    short = replace(INSPECTION, notes=(), troubles=(), skipped_rows=(), previews=INSPECTION.previews[::-1])
    write_page(short, path, model="Qwen/Qwen3-0.6B")
    for trained, colors, options in ((light, LIGHT, ()), (dark, DARK, (DARK_SCHEME,))):
        pixels = browser.screenshot(path.as_uri(), 1200, 1600, *options)
        assert share_of(trained, pixels) > 0.01
        assert share_of(colors.first, pixels) > 0.01  # drawn under the page's own policy
        assert share_of(colors.second, pixels) > 0.002
        assert num_colors(pixels) > 50


def test_rows_are_visible_on_a_phone(browser: Browser) -> None:
    framed = browser.folder / "framed.html"
    framed.write_text(frame('src="page.html#rows"', PHONE_WIDTH, PHONE_HEIGHT), "utf-8")
    pixels = browser.screenshot(framed.as_uri(), PHONE_WIDTH, PHONE_HEIGHT)
    assert share_of(trained_colors(browser.page)[0], pixels) > 0.01
    assert num_colors(pixels) > 50
