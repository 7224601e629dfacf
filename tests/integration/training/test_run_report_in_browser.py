"""`report.html` in a real browser: its errors, its width, and whether curves and labels are visible."""

import re
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.runs.report.run_page import write_report
from tests.support.processes.browser import DARK_SCHEME, Browser, find_browser, frame, share_of, with_script
from tests.support.runs.run_directories import a_record, step_done, write_run
from tests.unit.runs.test_run_report import events_of_a_run, hostile_record

PHONE_WIDTH, PHONE_HEIGHT = 390, 844
WIDE = 1200
PAPER_WIDTH = 718  # A4 less margins, in CSS pixels
LEAST_FONT_PIXELS, MOST_FONT_PIXELS = 9, 17
FACTS = """<script>addEventListener("load", () => {
  const root = document.documentElement;
  const box = element => {
    const at = element.getBoundingClientRect();
    return [at.left, at.top, at.right, at.bottom];
  };
  const boxes = (within, what) => Array.from(within.querySelectorAll(what), box);
  const seen = chart => Array.from(chart.querySelectorAll("svg.drawn")).filter(svg => svg.getClientRects().length);
  window.top.document.body.dataset.facts = JSON.stringify({
    scrollWidth: root.scrollWidth, innerWidth,
    outside: Array.from(document.querySelectorAll("body *:not(svg *)"), element => [element.tagName, box(element)])
      .filter(([, at]) => at[2] > innerWidth + 0.5).map(String),
    charts: Array.from(document.querySelectorAll(".chart"), chart => ({
      sizes: seen(chart).map(svg => svg.classList[1]), plot: box(seen(chart)[0]),
      labels: boxes(seen(chart)[0], "text"),
      fontPixels: Math.min(...Array.from(seen(chart)[0].querySelectorAll("text"),
        text => parseFloat(getComputedStyle(text).fontSize) * seen(chart)[0].getScreenCTM().a)),
      font: getComputedStyle(seen(chart)[0].querySelector("text")).fontFamily,
      keys: boxes(chart, ".legend li"),
      curves: Array.from(seen(chart)[0].querySelectorAll("g > path[style*='--first']"), path => path.getTotalLength()),
    })),
    scripts: document.querySelectorAll("main script").length,
    breaks: Array.from(document.querySelectorAll(".chart"), chart => getComputedStyle(chart).breakInside),
    display: getComputedStyle(document.querySelector(".charts")).display,
    columns: getComputedStyle(document.querySelector(".charts")).gridTemplateColumns.split(" ").length,
  });
});</script>"""


@pytest.fixture(scope="module", autouse=True)
def _pages_without_charts() -> None:
    """Draw charts, unlike the tests of runs."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    browser = find_browser(tmp_path_factory.mktemp("browser"))
    run = write_run(browser.folder / "run", events_of_a_run(), hostile_record())
    write_report(run).rename(browser.page)
    return browser


def facts_on_a_phone(browser: Browser) -> dict[str, Any]:
    return facts_in_a_frame(browser, PHONE_WIDTH)


def facts_in_a_frame(browser: Browser, width: int) -> dict[str, Any]:
    framed = browser.folder / "framed.html"
    page = escape(with_script(browser.page, FACTS))
    framed.write_text(frame(f'srcdoc="{page}"', width, PHONE_HEIGHT), "utf-8")
    return browser.facts(framed)


def overlap(one: list[float], other: list[float]) -> bool:
    """Return whether two boxes of left, top, right and bottom share more than an edge."""
    return min(one[2], other[2]) - max(one[0], other[0]) > 0.5 and min(one[3], other[3]) - max(one[1], other[1]) > 0.5


def check_charts(facts: dict[str, Any]) -> None:
    assert facts["scrollWidth"] <= facts["innerWidth"]
    assert facts["outside"] == []
    assert facts["scripts"] == 0
    assert len(facts["charts"]) == 5
    for chart in facts["charts"]:
        left, top, right, bottom = chart["plot"]
        assert len(chart["sizes"]) == 1
        assert right - left > 250
        assert bottom - top > 180
        assert LEAST_FONT_PIXELS <= chart["fontPixels"] <= MOST_FONT_PIXELS
        assert "system-ui" in chart["font"]
        assert chart["curves"]
        assert all(length > 100 for length in chart["curves"])
        assert all(left - 1 <= label[0] and label[2] <= right + 1 for label in chart["labels"])
        boxes = [*chart["labels"], *chart["keys"]]
        assert not [pair for pair in combinations(boxes, 2) if overlap(*pair)]


def test_a_wide_window_shows_two_charts_in_a_row(browser: Browser) -> None:
    copy = browser.folder / "copy.html"
    copy.write_text(with_script(browser.page, FACTS), "utf-8")
    facts = browser.facts(copy, f"--window-size={WIDE},1600")
    assert facts["innerWidth"] == WIDE
    check_charts(facts)
    assert facts["columns"] == 2
    plots = [chart["plot"] for chart in facts["charts"]]
    for one, other in ((1, 2), (3, 4)):
        assert plots[one][1] == plots[other][1]  # both are at one height
        assert plots[one][3] == plots[other][3]


def test_a_phone_scrolls_in_one_direction(browser: Browser) -> None:
    facts = facts_on_a_phone(browser)
    assert facts["innerWidth"] == PHONE_WIDTH
    check_charts(facts)
    assert facts["columns"] == 1
    assert {chart["sizes"][0] for chart in facts["charts"]} == {"narrow"}


@pytest.mark.parametrize("width", [320, 480, 640, 705, 800, 900, 1024, 1152, 1600])
def test_labels_are_legible_and_do_not_overlap_at_any_width(browser: Browser, width: int) -> None:
    check_charts(facts_in_a_frame(browser, width))


@pytest.mark.parametrize("num_steps", [3, 1_000_000])
def test_labels_of_short_and_long_runs_do_not_overlap_on_a_phone(browser: Browser, num_steps: int) -> None:
    steps = range(1, num_steps + 1, max(1, num_steps // 100))
    run = write_run(browser.folder / str(num_steps), [step_done(step, num_steps) for step in steps], a_record())
    other = Browser(browser.program, browser.folder / str(num_steps))
    write_report(run).rename(other.page)
    check_charts(facts_on_a_phone(other))


def test_no_chart_is_split_or_drawn_over_another_on_paper(browser: Browser) -> None:
    printed = browser.folder / "printed.html"
    html = with_script(browser.page, FACTS)
    assert html.count("@media print") == 1
    printed.write_text(html.replace("@media print", "@media all"), "utf-8")
    facts = browser.facts(printed, f"--window-size={PAPER_WIDTH},1000")
    check_charts(facts)
    assert facts["breaks"] == 5 * ["avoid"]
    assert facts["display"] == "block"  # the rows of a grid keep their heights across pages, and would overlap


def test_the_page_causes_no_errors(browser: Browser) -> None:
    assert browser.complaints(browser.page.as_uri()) == []
    broken = browser.folder / "broken.html"
    broken.write_text(browser.page.read_text("utf-8").replace("<main>", "<main><script>alert(1)</script>"), "utf-8")
    assert browser.complaints(broken.as_uri())  # so that the test would notice an error


def test_curves_are_visible_in_light_and_dark_mode(browser: Browser) -> None:
    html = browser.page.read_text("utf-8")
    for place, options in enumerate(((), (DARK_SCHEME,))):
        pixels = browser.screenshot(browser.page.as_uri(), WIDE, 1600, *options)
        for name, least in (("page", 0.5), ("first", 0.0003), ("second", 0.0003), ("third", 0.0001)):
            color = re.findall(rf"--{name}: (#\w+);", html)[place]
            assert share_of(color, pixels) > least, name


def test_hostile_text_is_shown_as_text(browser: Browser) -> None:
    dom = browser.open(browser.page.as_uri(), "--dump-dom")
    assert dom.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 20
    assert "<script" not in dom
    assert Path(browser.page).stat().st_size < 500_000
