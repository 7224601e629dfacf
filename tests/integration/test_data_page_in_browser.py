"""The page of `qlora inspect-data --html` in a real browser: what it loads, how wide it gets, and what is seen."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from numpy.typing import NDArray

from qlora_cli.data.page import DARK, LIGHT, PIXEL_RATIO, SCREENS, Screen, write_page
from qlora_cli.data.visible import visible
from tests.unit.test_data_page import INSPECTION, parse

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-quic", "--hide-scrollbars"),
    "--force-color-profile=srgb",
)
DARK_SCHEME = "--blink-settings=preferredColorScheme=0"
CSP = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>\n')
# What a copy of the page writes into itself, or into the page that frames it.
FACTS = """<script>addEventListener("load", () => {
  const image = document.querySelector("img"), root = document.documentElement;
  window.top.document.body.dataset.facts = JSON.stringify({
    naturalWidth: image.naturalWidth, naturalHeight: image.naturalHeight, width: image.clientWidth,
    scrollWidth: root.scrollWidth, innerWidth, rows: document.querySelectorAll("details.sample").length,
    trained: Array.from(document.querySelectorAll(".row .trained"), span => span.textContent),
    scripts: document.querySelectorAll("main script").length,
  });
});</script>"""
PHONE_WIDTH, PHONE_HEIGHT = 360, 800


@dataclass(frozen=True)
class Browser:
    """A browser without a window; `folder` holds its profiles, and the page that it opens."""

    program: str
    folder: Path

    @property
    def page(self) -> Path:
        return self.folder / "page.html"

    def open(self, address: str, *options: str) -> str:
        """Open a page and return what the browser writes on stdout."""
        home = self.folder / "home"
        command = [self.program, *OPTIONS, *options, f"--user-data-dir={home / 'profile'}", address]
        env = {**os.environ, "HOME": str(home)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def facts(self, path: Path, *options: str) -> dict[str, Any]:
        """Return what a copy with `FACTS` says of itself."""
        body = parse(self.open(path.as_uri(), "--dump-dom", *options)).all("body")[0]
        facts = json.loads(body.attributes["data-facts"])
        assert isinstance(facts, dict)
        return facts

    def screenshot(self, address: str, width: int, height: int, *options: str) -> NDArray[np.int16]:
        """Return what is seen, `(height, width, 3)`."""
        path = self.folder / "screenshot.png"
        path.unlink(missing_ok=True)
        self.open(address, f"--window-size={width},{height}", f"--screenshot={path}", *options)
        pixels = np.round(255 * imread(path)[..., :3]).astype(np.int16)
        assert pixels.shape == (height, width, 3)
        return pixels


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        missing = f"none of {', '.join(BROWSERS)} is installed"
        if os.environ.get("CI") == "true" and Path("/usr/bin/apt-get").exists():
            pytest.fail(f"{missing}, which CI should have")
        pytest.skip(missing)
    browser = Browser(program, tmp_path_factory.mktemp("browser"))
    write_page(INSPECTION, browser.page, model="Qwen/Qwen3-0.6B")
    return browser


def with_facts(page: Path) -> str:
    """Return the page with `FACTS`, and without the line that forbids scripts."""
    html, num_replaced = CSP.subn("", page.read_text("utf-8"))
    assert num_replaced == 1
    return html.replace("</body>", f"{FACTS}</body>")


def frame(attribute: str) -> str:
    """Return a page that shows another as a phone does: no window of the browser is that narrow."""
    style = f"border:0; width:{PHONE_WIDTH}px; height:{PHONE_HEIGHT}px"
    return f'<!DOCTYPE html><html><body style="margin:0"><iframe style="{style}" {attribute}></iframe></body></html>'


def share_of(color: str, pixels: NDArray[np.int16]) -> float:
    """Return which share of the pixels has a colour, to within rounding."""
    wanted = np.array([round(255 * part) for part in to_rgb(color)], np.int16)
    return float((np.abs(pixels - wanted).max(axis=2) <= 2).mean())


def num_colors(pixels: NDArray[np.int16]) -> int:
    return len(np.unique(pixels.astype(int) @ [256**2, 256, 1]))


def trained_colors(page: Path) -> list[str]:
    """Return the background of trained text in light and dark."""
    colors = re.findall(r"--trained: (#\w+);", page.read_text("utf-8"))
    assert len(colors) == 2
    return colors


def check_facts(facts: dict[str, Any], screen: Screen) -> None:
    assert facts["scrollWidth"] <= facts["innerWidth"]
    shown = (facts["naturalWidth"], facts["naturalHeight"])
    assert shown == (screen.width * PIXEL_RATIO, screen.height * PIXEL_RATIO)
    assert facts["width"] == screen.width
    assert facts["rows"] == len(INSPECTION.previews)
    pieces = [piece for row in INSPECTION.previews for piece in row.pieces]
    assert facts["trained"] == [visible(piece.text) for piece in pieces if piece.is_trained]
    assert facts["scripts"] == 0


def test_rows_trained_text_and_the_picture_are_there(browser: Browser) -> None:
    copy = browser.folder / "copy.html"
    copy.write_text(with_facts(browser.page), "utf-8")
    facts = browser.facts(copy, "--window-size=1200,1600")
    assert facts["innerWidth"] == 1200
    check_facts(facts, SCREENS[-1])


def test_a_phone_scrolls_in_one_direction_and_gets_a_picture_of_its_own(browser: Browser) -> None:
    framed = browser.folder / "framed.html"
    framed.write_text(frame(f'srcdoc="{escape(with_facts(browser.page))}"'), "utf-8")
    facts = browser.facts(framed)
    assert facts["innerWidth"] == PHONE_WIDTH
    check_facts(facts, SCREENS[1])


def test_in_light_and_dark_the_picture_and_trained_text_are_seen(browser: Browser) -> None:
    light, dark = trained_colors(browser.page)
    path = browser.folder / "short.html"  # rows begin within the window, a long one first
    short = replace(INSPECTION, notes=(), troubles=(), skipped_rows=(), previews=INSPECTION.previews[::-1])
    write_page(short, path, model="Qwen/Qwen3-0.6B")
    for trained, colors, options in ((light, LIGHT, ()), (dark, DARK, (DARK_SCHEME,))):
        pixels = browser.screenshot(path.as_uri(), 1200, 1600, *options)
        assert share_of(trained, pixels) > 0.01
        assert share_of(colors.bar, pixels) > 0.01  # drawn under the page's own policy
        assert share_of(colors.beyond, pixels) > 0.002
        assert num_colors(pixels) > 50


def test_on_a_phone_rows_are_seen(browser: Browser) -> None:
    framed = browser.folder / "framed.html"
    framed.write_text(frame('src="page.html#rows"'), "utf-8")
    pixels = browser.screenshot(framed.as_uri(), PHONE_WIDTH, PHONE_HEIGHT)
    assert share_of(trained_colors(browser.page)[0], pixels) > 0.01
    assert num_colors(pixels) > 50
