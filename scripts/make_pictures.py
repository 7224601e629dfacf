"""Draw the pictures of the docs from a real run of the demonstration: the live display, its report, the data page.

python scripts/make_pictures.py           # needs a Chromium or Chrome for the pages; takes about a minute
"""

import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

from qlora_cli.cli.progress.live_display import LiveReporter
from qlora_cli.demo.demonstration import ASSETS, demo_settings
from qlora_cli.events import Event, StepDone
from qlora_cli.training.train_run import train

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
COMMAND = "$ qlora train --config configs/demo.yaml --output runs/demo"
COLUMNS = 88
SHOWN_STEP = 120  # late enough for a curve, early enough for a bar that is not full
PAGE_WIDTH, REPORT_HEIGHT, DATA_HEIGHT = 1000, 1020, 1950
INSPECTION = (
    *("inspect-data", "--model", "base", "--dataset", "train.jsonl", "--max-length", "64"),
    *("--micro-batch-size", "4", "--accept-lost", "--html", "data.html"),
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Photographer:
    """A live display on an invisible terminal, copied once, after a certain step."""

    def __init__(self) -> None:
        terminal = Console(file=io.StringIO(), force_terminal=True, width=COLUMNS)
        self._display = LiveReporter(terminal)
        self.picture: str | None = None

    def report(self, event: Event) -> None:
        """Pass the event to the display, and copy the display after `SHOWN_STEP`."""
        self._display.report(event)
        if isinstance(event, StepDone) and event.step == SHOWN_STEP:
            copy = Console(file=io.StringIO(), force_terminal=True, width=COLUMNS, record=True)
            copy.print(Text(COMMAND, style="bold"), self._display.live.get_renderable(), sep="\n")
            self.picture = copy.export_svg(title="qlora train", unique_id="qlora-train")


def photograph_page(page: Path, picture: Path, height: int) -> None:
    """Write the first `height` pixels of a page as a PNG with few colours.

    Raises:
        SystemExit: no browser is installed.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as home:
        raw = Path(home) / "page.png"
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={home}")
        size = f"--window-size={PAGE_WIDTH},{height}"
        command = [browser, *options, size, f"--screenshot={raw}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True)
        Image.open(raw).convert("RGB").quantize(64).save(picture, optimize=True)


def main() -> None:
    """Train the bundled model, look at its rows, and write the pictures."""
    photographer = Photographer()
    folder = Path(tempfile.gettempdir()) / "qlora"  # its name is in the pictures
    folder.mkdir()
    try:
        shutil.copytree(ASSETS, folder, dirs_exist_ok=True)
        os.chdir(folder)
        train(demo_settings(Path("runs", "demo"), Path()), photographer)
        assert photographer.picture is not None, f"the run ended before step {SHOWN_STEP}"
        PICTURES.mkdir(exist_ok=True)
        (PICTURES / "live-display.svg").write_text(photographer.picture, encoding="utf-8")
        photograph_page(folder / "runs" / "demo" / "report.html", PICTURES / "report.png", REPORT_HEIGHT)
        subprocess.run([sys.executable, "-m", "qlora_cli", *INSPECTION], check=True, capture_output=True)
        photograph_page(folder / "data.html", PICTURES / "data.png", DATA_HEIGHT)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
