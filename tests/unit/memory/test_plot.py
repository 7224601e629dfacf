"""The picture of a sweep: its contents, the positions of labels, and that a file is complete or absent."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from qlora_cli.charts.canvas import drawing_style
from qlora_cli.memory import plot
from qlora_cli.memory.gpus import GPUS, Gpu, find_gpu
from qlora_cli.memory.plot import draw, memory_lines, plot_sweep, select_gpus, sizes_with_labels, spread_labels
from qlora_cli.memory.prediction import MemoryReport
from qlora_cli.units import GIB
from tests.support.models.predictions import REPORT, RTX_4090, T4, grid, sweep_point

GRID = replace(REPORT, sweep=grid())
SHORT = replace(REPORT, sweep=tuple(sweep_point(max_length=length) for length in (256, 512, 1024, 2048)))


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Return the texts of a figure that overlap once it is drawn."""
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_visible()]
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in texts]
    boxes = [(name, box) for name, box in boxes if name.strip() and box.width and box.height]
    return [
        (name, other)
        for index, (name, box) in enumerate(boxes)
        for other, other_box in boxes[index + 1 :]
        if box.shrunk(0.98, 0.9).overlaps(other_box.shrunk(0.98, 0.9))
    ]


def texts_of(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text) if isinstance(text, Text))


def test_there_is_a_line_for_each_micro_batch_size_with_its_band() -> None:
    lines = memory_lines(GRID)
    assert [line.label for line in lines] == [f"micro-batch-size {size}" for size in (1, 2, 4, 8)]
    for line in lines:
        assert line.lengths == tuple(512 * 2**power for power in range(7))
        assert all(low < middle < high for low, middle, high in zip(line.low, line.middle, line.high, strict=True))
    assert [line.label for line in memory_lines(SHORT)] == [""]


def test_the_speed_is_drawn_below_the_memory_where_it_is_known() -> None:
    figure = draw(GRID, ())
    memory, speed = figure.axes
    assert speed.get_ylabel() == "tokens/s, RTX 4090"
    assert len(speed.lines) == 4
    assert memory.get_xlim() == speed.get_xlim()
    for drawn, line in zip(speed.lines, memory_lines(GRID), strict=True):
        assert list(np.asarray(drawn.get_ydata())) == [middle for _, middle, _ in line.speeds]
        assert all(low < middle < high for low, middle, high in line.speeds)
    unknown = replace(GRID, sweep=tuple(replace(point, tokens_per_second=None) for point in GRID.sweep))
    assert len(draw(unknown, ()).axes) == 1


def test_a_setting_with_one_value_is_in_the_subtitle_not_in_the_legend() -> None:
    points = tuple(sweep_point(max_length=length, rank=64) for length in (512, 1024))
    report = replace(REPORT, sweep=points)
    assert [line.label for line in memory_lines(report)] == [""]
    text = texts_of(draw(report, ()))
    assert "rank 64" in text
    assert "rank 16" not in text
    assert "max-length 2048" not in text


def test_the_picture_says_model_settings_and_units() -> None:
    text = texts_of(draw(GRID, (RTX_4090, T4)))
    for expected in (
        "What training llama-3.1-8b takes",
        "quant nf4",
        "on RTX 4090 in bf16; shaded: error band",
        "process memory, GiB",
        "max-length, tokens",
        "RTX 4090: 23.5",
        "T4: 14.6",
        "micro-batch-size 8",
        "32,768",
    ):
        assert expected in text
    assert "micro-batch-size 1," not in text  # it is swept: no part of the subtitle


@pytest.mark.parametrize("report", [GRID, SHORT, replace(REPORT, sweep=SHORT.sweep[:1])])
@pytest.mark.parametrize(
    "names",
    [
        (),
        ("T4",),
        ("RTX 4090", "RTX 3090", "A10", "L4", "L40S", "A100 80GB", "H100 SXM", "B200"),
        tuple(gpu.name for gpu in GPUS),
    ],
)
def test_no_texts_overlap(report: MemoryReport, names: Sequence[str]) -> None:
    with drawing_style(plot.FONT_POINTS):
        assert overlapping(draw(report, tuple(map(find_gpu, names)))) == []


def test_cards_of_common_sizes_are_shown_if_none_was_named() -> None:
    shown, beyond = select_gpus((), 20.0)
    assert [gpu.name for gpu in shown] == ["RTX 3070", "RTX 3060 12GB", "RTX 4060 Ti 16GB", "RTX 4090"]
    assert beyond == []
    assert {gpu.name for gpu in select_gpus((), 1000.0)[0]} == set(plot.TYPICAL)


def test_a_card_far_above_the_curves_is_named_below_the_picture() -> None:
    shown, beyond = select_gpus((find_gpu("B200"), T4), 10.0)
    assert (shown, [gpu.name for gpu in beyond]) == ([T4], ["B200"])
    assert "above the picture: B200 (178.3 GiB)" in texts_of(draw(SHORT, (find_gpu("B200"),)))


def test_cards_of_nearly_equal_memory_share_a_line() -> None:
    def card(name: str, gib: float) -> Gpu:
        return replace(T4, name=name, total_bytes=round(gib * GIB))

    shown = [card("a", 22.0), card("b", 22.1), card("c", 22.2), card("d", 24)]
    assert sizes_with_labels(shown) == [(22.0, "a, b + 1: 22.0"), (24.0, "d: 24.0")]


@pytest.mark.parametrize(
    "heights",
    [[], [0.5], [0.5, 0.5, 0.5], [0.0, 0.01, 0.9], [0.1, 0.12, 0.97, 0.99], [0.2 + 0.001 * i for i in range(15)]],
)
def test_labels_are_spaced_within_the_picture(heights: list[float]) -> None:
    placed = spread_labels(heights, gap=0.05)
    assert len(placed) == len(heights)
    assert all(after - before >= 0.05 - 1e-9 for before, after in pairwise(placed))
    assert all(-1e-9 <= height <= 1 + 1e-9 for height in placed)
    assert spread_labels([0.1, 0.5, 0.9], gap=0.05) == pytest.approx([0.1, 0.5, 0.9])
    assert spread_labels([0.5, 0.5], gap=0.1) == pytest.approx([0.45, 0.55])
    crowd = spread_labels([0.5] * 101, gap=0.05)  # more than fit
    assert (crowd[0], crowd[-1]) == pytest.approx((0, 1))


def test_more_lines_than_colours_are_still_distinguishable() -> None:
    points = tuple(sweep_point(max_length=512, micro_batch_size=rows) for rows in range(1, 13))
    figure = draw(replace(REPORT, sweep=points), ())
    colors = {line.get_color() for line in figure.axes[0].get_lines() if line.get_marker() == "o"}
    assert len(colors) == 12
    assert figure.legends  # below the picture, where it covers nothing


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_suffix_determines_the_format_and_no_other_file_is_left(tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / f"memory{suffix}"
    path.write_text("old")
    plot_sweep(GRID, (RTX_4090,), path)
    assert path.read_bytes().startswith(magic)
    assert list(tmp_path.iterdir()) == [path]


def test_a_picture_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "memory.png"
    path.write_text("old")

    def fails(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("qlora_cli.writing.os.fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        plot_sweep(GRID, (), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_equal_sweeps_are_equal_files(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / f"one{suffix}", tmp_path / f"other{suffix}"
    plot_sweep(GRID, (RTX_4090,), one)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")  # the source of a date in the file
    plot_sweep(GRID, (RTX_4090,), other)
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("model", ["a$b$c", "$\\frac$", "模型", "x\u202ey\0z", "lone \ud800", "a\nb"])
def test_any_name_of_a_model_can_be_drawn(tmp_path: Path, model: str, recwarn: pytest.WarningsRecorder) -> None:
    plot_sweep(replace(SHORT, model=model), (), tmp_path / "memory.png")
    assert not recwarn.list
    assert (tmp_path / "memory.png").stat().st_size > 10_000


def test_matplotlib_settings_are_unchanged(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    plot_sweep(SHORT, (), tmp_path / "memory.png")
    assert dict(mpl.rcParams) == before
