"""A real headless browser, for the pages that commands write."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from numpy.typing import NDArray

from tests.unit.data_rows.test_data_page import parse

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-quic", "--hide-scrollbars"),
    "--force-color-profile=srgb",
)
# Without them, a picture that is taken on a busy machine may have parts that are not drawn yet.
ALL_IS_DRAWN = ("--run-all-compositor-stages-before-draw", "--virtual-time-budget=10000")
DARK_SCHEME = "--blink-settings=preferredColorScheme=0"
CSP = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>\n')


@dataclass(frozen=True)
class Browser:
    """A headless browser; `folder` has its profiles, and the page that it opens."""

    program: str
    folder: Path

    @property
    def page(self) -> Path:
        return self.folder / "page.html"

    def open(self, address: str, *options: str) -> str:
        """Open a page and return what the browser prints on stdout."""
        return self._run(address, *options).stdout

    def complaints(self, address: str, *options: str) -> list[str]:
        """Open a page and return the lines on its console: errors of the page, and what its policy refused."""
        done = self._run(address, "--enable-logging=stderr", "--dump-dom", *options)
        return [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    def facts(self, path: Path, *options: str) -> dict[str, Any]:
        """Return the facts that the script in a copy made by `with_script` reports about the page."""
        body = parse(self.open(path.as_uri(), "--dump-dom", *options)).all("body")[0]
        facts = json.loads(body.attributes["data-facts"])
        assert isinstance(facts, dict)
        return facts

    def screenshot(self, address: str, width: int, height: int, *options: str) -> NDArray[np.int16]:
        """Return the visible pixels, `(height, width, 3)`."""
        path = self.folder / "screenshot.png"
        path.unlink(missing_ok=True)
        self.open(address, f"--window-size={width},{height}", f"--screenshot={path}", *ALL_IS_DRAWN, *options)
        pixels = np.round(255 * imread(path)[..., :3]).astype(np.int16)
        assert pixels.shape == (height, width, 3)
        return pixels

    def _run(self, address: str, *options: str) -> "subprocess.CompletedProcess[str]":
        home = self.folder / "home"
        command = [self.program, *OPTIONS, *options, f"--user-data-dir={home / 'profile'}", address]
        env = {**os.environ, "HOME": str(home)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
        assert done.returncode == 0, done.stderr
        return done


def find_browser(folder: Path) -> Browser:
    """Return a browser; without one the test is skipped or, in a CI that should have one, fails."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        missing = f"none of {', '.join(BROWSERS)} is installed"
        if os.environ.get("CI") == "true" and Path("/usr/bin/apt-get").exists():
            pytest.fail(f"{missing}, which CI should have")
        pytest.skip(missing)
    return Browser(program, folder)


def with_script(page: Path, script: str) -> str:
    """Return the page with `script`, and without the line that forbids scripts."""
    html, num_replaced = CSP.subn("", page.read_text("utf-8"))
    assert num_replaced == 1
    return html.replace("</body>", f"{script}</body>")


def frame(attribute: str, width: int, height: int) -> str:
    """Return a page that shows another one in a frame as narrow as a phone, which no window of the browser can be."""
    style = f"border:0; width:{width}px; height:{height}px"
    return f'<!DOCTYPE html><html><body style="margin:0"><iframe style="{style}" {attribute}></iframe></body></html>'


def share_of(color: str, pixels: NDArray[np.int16]) -> float:
    """Return the share of pixels that have a colour, up to rounding."""
    wanted = np.array([round(255 * part) for part in to_rgb(color)], np.int16)
    return float((np.abs(pixels - wanted).max(axis=2) <= 2).mean())
