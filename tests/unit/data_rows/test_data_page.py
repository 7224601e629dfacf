"""The page of `qlora inspect-data --html`: its contents, that it is self-contained, and that no data breaks it."""

import os
import re
import stat
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import pytest

from qlora_cli.data.feeding.data_report import DataReport
from qlora_cli.data.showing import page
from qlora_cli.data.showing.inspection import Bar, BatchSummary, DataInspection, Trouble
from qlora_cli.data.showing.page import (
    SIZES,
    describe_lengths,
    lengths_chart,
    position_of,
    render_page,
    runs_of,
    write_page,
)
from qlora_cli.data.showing.page_file import check_page
from qlora_cli.data.showing.preview import RowPreview, TokenPiece
from qlora_cli.visible import visible

SCRIPT = "<script>alert(1)</script>"
NASTY = (
    *(SCRIPT, "&amp;", "\"'`", "\u202egnp.exe", "\0", "👩🏽", "x" * 10_000, "a\tb", "\u200b", "</span></details>"),
    *("{{ 7 * 7 }}", "<img src=https://example.com/x.png onerror=alert(1)>", "<!--", "]]>", "\r\n"),
)
VOID = {"meta", "source", "img", "br", "link", "input", "hr"}
MODEL = "Qwen/Qwen3-0.6B"


def piece(text: str, *, trained: bool = False, special: bool = False, padding: bool = False) -> TokenPiece:
    return TokenPiece(ids=(7,), text=text, is_trained=trained, is_special=special, is_padding=padding)


PAD = piece("<|pad|>", special=True, padding=True)
CHAT = (
    piece("<|im_start|>", special=True),
    piece("user\n"),
    piece("Say"),
    piece(" hello"),
    piece(" "),
    piece("<|im_end|>", special=True),
    piece("\n"),
    piece("Hello,", trained=True),
    piece(" world.\n", trained=True),
    replace(piece("🙂", trained=True), ids=(8, 9, 10)),
    piece("<|im_end|>", trained=True, special=True),
)
ROWS = (
    RowPreview(where="chats.jsonl, row 1", num_tokens=13, num_supervised=6, pieces=(*CHAT, *[PAD] * 40)),
    RowPreview(
        where=f"chats.jsonl, row 2 {SCRIPT}",
        num_tokens=len(NASTY),
        num_supervised=len(NASTY) // 2,
        pieces=(*(piece(text, trained=place % 2 == 0) for place, text in enumerate(NASTY)), PAD, PAD),
    ),
)
REPORT = DataReport(
    name="chats.jsonl, more.parquet",
    format="messages",
    recognised="messages (messages is conversations)",
    rows=52_002,
    rows_trained=51_310,
    tokens=1_234_567_890,
    supervised_tokens=617_283_945,
    longest_row_tokens=512,
    truncated_rows=213,
    dropped_rows=0,
    tokens_lost=34_567,
    supervised_tokens_lost=12_345,
    rows_without_supervision=28,
    duplicate_rows=81,
    duplicates_dropped=80,
    held_out_rows=500,
    near_duplicate_rows=None,
    desirable_rows=None,
    groups=None,
    mixture=(),
    bad_rows=3,
    empty_answers=2,
    packed_rows=None,
    fingerprint="0123456789abcdef" * 4,
)
HELD_OUT = replace(REPORT, rows=500, rows_trained=499, tokens=98_765_432, supervised_tokens=0, held_out_rows=0)
BARS = tuple(Bar(first=first, last=first + 99, rows=900 - first) for first in range(1, 802, 100))
INSPECTION = DataInspection(
    data=REPORT,
    evaluation=HELD_OUT,
    max_length=550,
    longest_uncut_tokens=880,
    median_uncut_tokens=240,
    refusals=(),
    lengths=BARS,
    batches=BatchSummary(
        micro_batch_size=4,
        micro_batch_tokens=None,
        micro_batches=None,
        padding_share=0.2345,
        grouped_padding_share=0.0123,
        packed_rows=11_385,
        packing_efficiency=0.9973,
    ),
    troubles=(Trouble(kind="repeats an earlier row", rows=81, where=("chats.jsonl, row 17", f"{SCRIPT}, row 99")),),
    notes=("The template ends no turn.", f"A note {SCRIPT} \u202e&amp;"),
    skipped_rows=(Path("/cache/skipped/0123.jsonl"),),
    previews=ROWS,
)
PLAIN = replace(INSPECTION, evaluation=None, troubles=(), notes=(), skipped_rows=(), previews=())


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list["Element | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str = "", kind: str = "") -> list["Element"]:
        """Return the descendants with a tag and a class, in order."""
        return [
            element
            for element in self._within()
            if (not tag or element.tag == tag) and (not kind or kind in element.kinds)
        ]

    @property
    def kinds(self) -> list[str]:
        return self.attributes.get("class", "").split()

    def _within(self) -> Iterator["Element"]:
        for child in self.children:
            if isinstance(child, Element):
                yield child
                yield from child._within()


class Strict(HTMLParser):
    """Parses a page into elements; a tag that is unclosed, or closed in the wrong order, is a failure."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice: {attrs}"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> within <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def parse(html: str) -> Element:
    reader = Strict()
    reader.feed(html)
    reader.close()
    assert reader.open == [reader.root]
    return reader.root


@pytest.fixture(scope="module")
def html() -> str:
    return render_page(INSPECTION, model=MODEL)


@pytest.fixture(scope="module")
def root(html: str) -> Element:
    return parse(html)


def body_rows(root: Element) -> list[Element]:
    return root.all("div", "row")


def test_the_page_begins_with_data_set_model_and_format(root: Element) -> None:
    assert root.all("title")[0].text.startswith("chats.jsonl, more.parquet")
    assert [heading.text for heading in root.all("h1")] == ["chats.jsonl, more.parquet"]
    assert MODEL in root.all("header")[0].text
    first = root.all("main")[0].all("p")[0].text
    assert "Recognised as messages (messages is conversations)" in " ".join(first.split())
    assert root.all("html")[0].attributes["lang"] == "en"
    assert all(len(root.all(landmark)) == 1 for landmark in ("header", "main", "footer"))


def test_headings_are_in_order(root: Element) -> None:
    headings = [element for element in root.all() if re.fullmatch("h[1-6]", element.tag)]
    assert [(heading.tag, heading.text) for heading in headings] == [
        ("h1", "chats.jsonl, more.parquet"),
        ("h2", "Rows and tokens"),
        ("h2", "Lengths"),
        ("h2", "Batches"),
        ("h2", "Notes"),
        ("h2", "Worth a look"),
        ("h2", "The first rows, token by token"),
        ("h3", "chats.jsonl, row 1"),
        ("h3", f"chats.jsonl, row 2 {SCRIPT}"),
    ]
    named = {section.attributes["aria-labelledby"] for section in root.all("section")}
    assert named == {heading.attributes["id"] for heading in headings if heading.tag == "h2"}


def test_the_page_is_self_contained_and_runs_no_script(html: str, root: Element) -> None:
    for element in root.all():
        assert element.tag not in {"script", "link", "iframe", "object", "embed", "base", "form", "img", "a"}
        for name, value in element.attributes.items():
            assert not name.startswith("on"), element
            if name in {"src", "srcset", "href", "data", "action", "poster", "background"}:
                assert value.startswith("#"), element  # within the drawing
            else:
                assert not re.search(r"https?://", value), element
    style = root.all("style")[0].text
    assert "url(" not in style
    assert "@import" not in style
    assert [meta.attributes["content"] for meta in root.all("meta") if "http-equiv" in meta.attributes] == [
        "default-src 'none'; style-src 'unsafe-inline'"
    ]
    rest = html.replace("&lt;img src=https://example.com/x.png onerror=alert(1)&gt;", "")  # the text of a row
    assert not re.search(r"https?://", rest)


def test_untrusted_text_is_escaped(root: Element) -> None:
    assert [SCRIPT in item.text for item in root.all("section")[3].all("li")] == [False, True]
    assert f"{SCRIPT}, row 99" in [item.text for item in root.all("li")]
    assert "A note <script>alert(1)</script> [U+202E]&amp;" in [item.text for item in root.all("li")]
    name = f"{SCRIPT}\"'\u202e\udcff"
    hostile = replace(INSPECTION, data=replace(REPORT, name=name, recognised=name), skipped_rows=(Path("/\udcff"),))
    page = parse(render_page(hostile, model=name))
    assert page.all("h1")[0].text == f"{SCRIPT}\"'[U+202E][U+DCFF]"
    assert page.all("script") == []


def test_each_piece_is_a_span_with_its_token_ids(root: Element) -> None:
    for row, shown in zip(ROWS, body_rows(root), strict=True):
        spans = shown.all("span")
        assert [span.attributes["title"] for span in spans] == [
            f"token{'s' if len(one.ids) > 1 else ''} {', '.join(map(str, one.ids))}" for one in row.pieces
        ]
        for one, span in zip(row.pieces, spans, strict=True):
            expected = {"trained": one.is_trained, "special": one.is_special, "padding": one.is_padding}
            assert span.kinds == [kind for kind, is_so in expected.items() if is_so]


def test_exactly_the_trained_text_is_in_marked_spans(root: Element) -> None:
    chat, nasty = body_rows(root)
    assert [span.text for span in chat.all("span", "trained")] == ["Hello,", " world.⏎\n", "🙂", "<|im_end|>"]
    assert [span.text for span in nasty.all("span", "trained")] == [visible(text) for text in NASTY[::2]]
    untrained = [span.text for span in nasty.all("span") if "trained" not in span.kinds]
    assert untrained == [*(visible(text) for text in NASTY[1::2]), "<|pad|>", "<|pad|>"]


def test_a_row_contains_only_tokens(root: Element) -> None:
    chat, _ = body_rows(root)
    assert chat.text == (
        "<|im_start|>user⏎\nSay hello·<|im_end|>⏎\nHello, world.⏎\n🙂<|im_end|>+ 40 tokens of padding" + "<|pad|>" * 40
    )


def test_more_than_a_few_pad_tokens_are_folded(root: Element) -> None:
    chat, nasty = body_rows(root)
    assert len(chat.all("details", "fold")[0].all("span", "padding")) == 40
    assert nasty.all("details") == []
    assert len(nasty.all("span", "padding")) == 2


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([piece("a "), piece("b")], "a b"),
        ([piece("a "), piece("\nb")], "a·⏎\nb"),
        ([piece("a "), piece("  "), piece("\n")], "a···⏎\n"),
        ([piece("a "), piece("  "), piece("b")], "a   b"),
        ([piece("Answer: "), piece("yes", trained=True)], "Answer:·yes"),
        ([piece("a "), piece("<e>", special=True), piece("b ")], "a·<e>b·"),
        ([piece("a "), piece(""), piece("b")], "a ∅b"),
    ],
)
def test_a_space_is_marked_where_a_line_a_turn_or_trained_text_ends(pieces: list[TokenPiece], expected: str) -> None:
    row = replace(ROWS[0], pieces=tuple(pieces))
    assert "".join(part.text for run in runs_of(row) for token in run.tokens for part in token.parts) == expected


def test_figures_are_next_to_those_of_held_out_rows(root: Element) -> None:
    lines = {
        line.all("th")[0].text: [cell.text for cell in line.all("td")] for line in root.all("tr") if line.all("td")
    }
    lines.pop(next(iter(lines)))  # the heads
    assert lines == {
        "Rows read": ["52,002", "500"],
        "Rows fed": ["51,310", "499"],
        "Tokens fed": ["1,234,567,890", "98,765,432"],
        "Trained tokens": ["617,283,94550.0 %", "0"],
        "Rows truncated": ["213", "213"],
        "Rows dropped as too long": ["0", "0"],
        "Tokens lost": ["34,567< 0.1 %", "34,567< 0.1 %"],
        "Trained tokens lost": ["12,345< 0.1 %", "12,345100.0 %"],
        "Rows without trained tokens": ["28", "28"],
        "Duplicate rows": ["8180 dropped", "8180 dropped"],
        "Bad rows": ["32 empty", "32 empty"],
        "Rows held out": ["500", "\u2013"],
    }
    assert [head.text for head in root.all("thead")[0].all("th")] == ["trained", "held out"]


def test_batches_troubles_and_notes_are_shown(root: Element) -> None:
    text = " ".join(root.all("main")[0].text.split())
    for expected in (
        "23.4 % of the tokens, with micro-batches of 4",
        "1.2 % would be padding",
        "11,385 rows of 550 tokens, 99.7 % filled",
        "The template ends no turn.",
        "81 rows: repeats an earlier row",
        "chats.jsonl, row 17",
        "and 79 more",
        "/cache/skipped/0123.jsonl",
        "13 tokens, 6 trained",
    ):
        assert expected in text


def test_empty_sections_are_left_out() -> None:
    page = parse(render_page(PLAIN, model=MODEL))
    assert [heading.text for heading in page.all("h2")] == ["Rows and tokens", "Lengths", "Batches"]
    assert page.all("thead") == []


def test_the_histogram_is_drawn_for_a_window_and_a_phone_with_a_description(root: Element) -> None:
    drawings = root.all("svg", "drawn")
    assert [drawing.kinds[1] for drawing in drawings] == [size.name for size in SIZES]
    for drawing in drawings:
        assert drawing.attributes["aria-label"] == (
            "Histogram of the lengths of 4,491 rows. The tallest bar: 899 rows of 1 to 100 tokens. The longest row "
            "has 880 tokens. A line marks the max length, 550 tokens; longer rows are in another colour."
        )
        assert [title.text for title in drawing.all("title")][:2] == [
            "1 to 100 tokens: 899 rows",
            "101 to 200 tokens: 799 rows",
        ]
        assert {"max length 550", "tokens of a row", "rows"} <= {text.text for text in drawing.all("text")}


def test_the_description_says_when_no_row_is_longer() -> None:
    assert describe_lengths(replace(PLAIN, max_length=880)).endswith("880 tokens; no row is longer.")


def test_the_max_length_is_a_limit_that_longer_rows_exceed() -> None:
    chart = lengths_chart(INSPECTION)
    assert (chart.edges[0], chart.edges[-1]) == (0, 900)
    assert chart.counts == tuple(bar.rows for bar in BARS)
    assert (chart.limit.position, chart.limit.label) == (5.5, "max length 550")
    assert chart.limit.is_exceeded
    assert not lengths_chart(replace(PLAIN, max_length=880)).limit.is_exceeded


@pytest.mark.parametrize(("max_length", "is_far"), [(550, False), (1000, False), (32_768, True)])
def test_a_max_length_far_beyond_the_rows_is_not_drawn_to_scale(max_length: int, is_far: bool) -> None:
    assert lengths_chart(replace(PLAIN, max_length=max_length)).limit.is_far == is_far


def test_positions_follow_bars_of_equal_and_of_doubling_width() -> None:
    doubling = tuple(Bar(first=last // 2 + 1, last=last, rows=1) for last in (16, 32, 64))
    assert [position_of(length, doubling) for length in (4, 8, 12, 16, 24, 64, 256)] == [0, 0, 0.5, 1, 1.5, 3, 5]
    late = BARS[2:]  # no empty bars before the shortest row
    assert [position_of(length, late) for length in (10, 300, 350, 900, 1000)] == [0, 1, 1.5, 7, 8]


def test_the_page_is_deterministic_and_leaves_matplotlib_settings_unchanged(html: str) -> None:
    before = dict(mpl.rcParams)
    assert render_page(INSPECTION, model=MODEL) == html
    assert dict(mpl.rcParams) == before


def test_the_file_is_complete_and_only_readable_by_its_owner(tmp_path: Path, html: str) -> None:
    path = tmp_path / ("page" * 60 + ".html")
    (tmp_path / "other").write_text("")
    write_page(INSPECTION, path, model=MODEL)
    assert path.read_bytes() == html.encode("utf-8")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600  # it holds rows
    assert sorted(tmp_path.iterdir()) == sorted([path, tmp_path / "other"])


def test_a_page_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")

    def fails(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(page, "render_page", lambda *_, **__: "new")
    monkeypatch.setattr("qlora_cli.writing.os.fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        write_page(PLAIN, path, model=MODEL)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_invalid_page_path_is_reported_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_page(tmp_path / "page.html") is None
    (tmp_path / "page.html").write_text("an older one")
    assert check_page(tmp_path / "page.html") is None
    os.mkfifo(tmp_path / "pipe")
    for path, expected in (
        (tmp_path, "is a directory"),
        (tmp_path / "none" / "page.html", f"there is no directory {tmp_path / 'none'}"),
        (tmp_path / "page.html" / "page.html", "there is no directory"),
        (tmp_path / "pipe", "is not a regular file"),
        (tmp_path / ("a" * 300), "can't be used: File name too long"),
    ):
        problem = check_page(path)
        assert expected in str(problem)
        assert problem is not None
        assert problem.hint
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "can't be written to" in str(check_page(tmp_path / "page.html"))


def test_the_page_needs_only_required_dependencies() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8"))["project"]
    assert any(re.match(r"matplotlib\b", requirement) for requirement in project["dependencies"])
    assert "plot" in project["optional-dependencies"]  # for those who install by the name of earlier versions


def test_the_template_is_part_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8"))
    assert f"data/showing/{page.TEMPLATE}" in project["tool"]["setuptools"]["package-data"]["qlora_cli"]
