"""Histograms: bars, the line at the limit, and labels that fit."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from qlora_cli.charts.canvas import ChartSize, drawing_style
from qlora_cli.charts.histogram import Histogram, LimitLine, draw_histogram, edge_ticks, embedded_histogram
from qlora_cli.charts.palette import LIGHT
from tests.unit.charts.svg import notes, parse_drawings, texts

NARROW = ChartSize(name="narrow", width=340, height=240, num_ticks=4)
MEDIUM = ChartSize(name="medium", width=600, height=270, num_ticks=8)
CHART = Histogram(
    edges=tuple(range(0, 901, 100)),
    counts=(899, 799, 699, 599, 499, 399, 299, 0, 99),
    limit=LimitLine(position=5.5, label="max length 550", is_far=False, is_exceeded=True),
    x_name="tokens",
    y_name="rows",
    notes=tuple(f"bar {place}" for place in range(9)),
)


def drawn(chart: Histogram, size: ChartSize = MEDIUM) -> Figure:
    with drawing_style():
        figure = draw_histogram(chart, size)
        figure.draw_without_rendering()
    return figure


def bars_of(figure: Figure) -> list[Rectangle]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]


def test_bars_have_their_heights_and_another_colour_beyond_the_limit() -> None:
    bars = bars_of(drawn(CHART))
    assert {to_hex(bar.get_facecolor()) for bar in bars if bar.get_x() + bar.get_width() <= 5.5} == {LIGHT.first}
    assert {to_hex(bar.get_facecolor()) for bar in bars if bar.get_x() >= 5.5} == {LIGHT.second}
    assert [bar.get_height() for bar in bars] == [899, 799, 699, 599, 499, 399, 399, 299, 99]  # one in two colours
    all_fit = drawn(replace(CHART, limit=replace(CHART.limit, is_exceeded=False)))
    assert {to_hex(bar.get_facecolor()) for bar in bars_of(all_fit)} == {LIGHT.first}


def test_a_line_marks_the_limit_to_scale_unless_it_is_far() -> None:
    for limit, place, label in (
        (CHART.limit, 5.5, "max length 550"),
        (replace(CHART.limit, position=10.0), 10, "max length 550"),
        (replace(CHART.limit, position=327.7, is_far=True), 9.27, "max length 550 →"),
    ):
        axes = drawn(replace(CHART, limit=limit)).axes[0]
        (line,) = axes.get_lines()
        assert np.asarray(line.get_xdata()).tolist() == pytest.approx([place, place])
        assert axes.get_xlim()[1] < 1.2 * len(CHART.counts)
        assert label in [text.get_text() for text in axes.texts]


def test_edge_ticks_are_multiples_of_one_number_or_every_few_bars() -> None:
    assert edge_ticks(range(0, 901, 100), 4) == {0: 0, 3: 300, 6: 600, 9: 900}
    assert edge_ticks(range(200, 901, 100), 5) == {0: 200, 2: 400, 4: 600, 6: 800}
    assert edge_ticks((0, 16, 32, 64, 128), 3) == {0: 0, 2: 32, 4: 128}


@pytest.mark.parametrize("counts", [CHART.counts, (5,), (10**9,) * 9, (1, 10**9)])
@pytest.mark.parametrize("size", [NARROW, MEDIUM])
@pytest.mark.parametrize(("place", "is_far"), [(0.01, False), (0.6, False), (1310.7, True)])
def test_labels_are_within_the_drawing_and_do_not_overlap(
    counts: tuple[int, ...], size: ChartSize, place: float, is_far: bool
) -> None:
    limit = LimitLine(position=place, label="max length 131,072", is_far=is_far, is_exceeded=not is_far)
    figure = drawn(replace(CHART, counts=counts, edges=CHART.edges[: len(counts) + 1], limit=limit), size)
    box, whole = figure.get_tightbbox(), figure.bbox_inches
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= whole.x1
    assert box.y1 <= whole.y1
    axes = figure.axes[0]
    ticks = [Text.get_window_extent(label) for label in axes.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(ticks))
    name = Text.get_window_extent(axes.yaxis.label)
    assert all(name.x1 < Text.get_window_extent(label).x0 for label in axes.get_yticklabels())


@pytest.mark.parametrize(("most", "scale"), [(1000, "linear"), (1001, "log")])
def test_counts_are_logarithmic_only_if_they_span_more_than_three_orders(most: int, scale: str) -> None:
    axes = drawn(replace(CHART, counts=(most, 0, 1), edges=(0, 1, 2, 3))).axes[0]
    assert axes.get_yscale() == scale
    assert axes.get_ylabel() == ("rows" if scale == "linear" else "rows, logarithmic")


def test_counts_are_written_as_whole_numbers() -> None:
    for counts in ((1, 2, 3), (10**9, 3, 1), (1,)):
        labels = [label.get_text() for label in drawn(replace(CHART, counts=counts)).axes[0].get_yticklabels()]
        assert labels
        assert all(label.replace(",", "").isdigit() for label in labels)


def test_each_bar_has_its_note() -> None:
    with drawing_style():
        drawings = parse_drawings(embedded_histogram(CHART, "lengths", (MEDIUM, NARROW), description="Lengths."))
    for drawing in drawings:
        assert notes(drawing) == list(CHART.notes)
        assert "max length 550" in texts(drawing)
