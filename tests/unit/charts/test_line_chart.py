"""Lines, marks and rules: their positions, and that no values break them or the page."""

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlora_cli.charts.axis_range import AxisRange, spanning
from qlora_cli.charts.canvas import ChartSize, drawing_style
from qlora_cli.charts.line_chart import Curve, LineChart, Mark, MarkLook, Rule, draw_line_chart, embedded_line_chart
from qlora_cli.charts.page_svg import Note
from qlora_cli.charts.series import Point
from tests.unit.charts.svg import notes, parse_drawings, strokes, texts

NAN, INF = float("nan"), float("inf")
SMALL = ChartSize(name="narrow", width=340, height=240, num_ticks=4)
LARGE = ChartSize(name="wide", width=1000, height=362, num_ticks=8)
EMPTY = LineChart(x=AxisRange(low=0, high=10), y=AxisRange(low=0, high=1), x_name="step", num_levels=5)


def embed(chart: LineChart, *sizes: ChartSize) -> str:
    with drawing_style():
        return embedded_line_chart(chart, "loss", sizes or (SMALL,), description="A loss & its <mean>.")


def with_line(points: Sequence[Point], *, is_faint: bool = False) -> LineChart:
    return replace(EMPTY, curves=(Curve("first", points, is_faint=is_faint),))


def test_a_line_rises_with_its_values_and_spans_the_axes() -> None:
    (drawing,) = parse_drawings(embed(with_line([(0, 0.0), (5, 0.5), (10, 1.0)])))
    ((low, middle, high),) = strokes(drawing, "first", "1.75")
    assert low[0] < middle[0] < high[0]
    assert low[1] > middle[1] > high[1]
    assert middle == pytest.approx(((low[0] + high[0]) / 2, (low[1] + high[1]) / 2), abs=0.11)
    assert (high[1], low[1]) == pytest.approx((8, 240 - 42), abs=0.11)
    assert high[0] == pytest.approx(340 - 12, abs=0.11)


def test_a_line_breaks_at_gaps_and_a_point_between_two_is_a_dot() -> None:
    points = [(0, 0.5), (1, 0.6), (2, NAN), (3, 0.5), (4, INF), (5, 0.1), (6, 0.2), (7, -1e300), (8, 0.3)]
    (drawing,) = parse_drawings(embed(with_line(points)))
    lines = strokes(drawing, "first", "1.75")
    assert [len(line) for line in lines] == [2, 2, 2, 2]
    assert lines[1][0] == lines[1][1]  # with round ends, a dot
    assert lines[3][0] == lines[3][1]
    assert "stroke-linecap: round" in embed(with_line(points))


def test_lines_beyond_the_chart_are_cut_near_it() -> None:
    svg = embed(with_line([(0, 0.5), (1, 1e99), (2, 0.5), (3, -1e99), (4, 0.5)]))
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", svg)]
    assert max(map(abs, numbers)) < 1000
    assert "nan" not in svg


@example([5.8e73, 4.4e-67], True, False)
@example([9e98, 2e-99], True, False)
@given(
    st.lists(st.one_of(st.floats(), st.floats(0, 10)), min_size=1, max_size=30),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_values_make_a_drawing_with_valid_numbers(values: list[float], is_log: bool, is_faint: bool) -> None:
    drawable = [value for value in values if -1e99 < value < 1e99 and (value > 1e-99 or not is_log)]
    chart = replace(
        with_line([(step, value) for step, value in enumerate(values)], is_faint=is_faint),
        x=spanning(range(len(values))),
        y=spanning(drawable or [1.0], is_log=is_log),
    )
    (drawing,) = parse_drawings(embed(chart))
    for element in drawing.iter():
        places = [element.attrib.get(key, "") for key in ("d", "x", "y", "width", "height", "transform")]
        assert not any(re.search(r"nan|inf|\de", place) for place in places)


def test_a_long_line_has_no_more_points_than_pixels_and_all_its_spikes() -> None:
    points: list[Point] = [(step, 0.5) for step in range(10_000)]
    points[5_001] = (5_001, 0.99)
    chart = replace(with_line(points), x=AxisRange(low=0, high=10_000))
    for size, drawing in zip((LARGE, SMALL), parse_drawings(embed(chart, LARGE, SMALL)), strict=True):
        (line,) = strokes(drawing, "first", "1.75")
        assert len(line) < 2 * size.width
        assert min(y for _, y in line) < 15


def test_rules_and_marks_are_at_their_values_with_their_notes() -> None:
    ring, dot = MarkLook("second", 12, is_ring=True), MarkLook("good", 6)
    chart = replace(
        EMPTY,
        rules=(Rule("muted", 5, "resumed", is_level=False), Rule("third", 0.5, "a limit", is_level=True)),
        marks=(Mark(ring, 5, 0.5, "the best"), Mark(dot, 2, 0.1, "saved"), Mark(dot, 4, 0.1, "saved again")),
        notes=(Note("steps 0 to 10\nloss 0.5", x=(0, 10)),),
    )
    (drawing,) = parse_drawings(embed(chart))
    ((upper, lower),) = strokes(drawing, "muted", "1.25")
    ((left, right),) = strokes(drawing, "third", "1.25")
    assert upper[0] == lower[0] == pytest.approx((left[0] + right[0]) / 2, abs=0.11)
    uses = [(float(use.attrib["x"]), float(use.attrib["y"])) for use in drawing.iter("use")]
    assert len(uses) == 3
    assert uses[0] == pytest.approx((upper[0], left[1]), abs=0.11)
    assert uses[1][0] < uses[2][0] < uses[0][0]
    assert uses[1][1] > uses[0][1]
    assert notes(drawing) == ["steps 0 to 10\nloss 0.5", "resumed", "a limit", "the best", "saved", "saved again"]
    for rect, (x, y) in zip(drawing.findall("rect")[-3:], uses, strict=True):
        place = {key: float(rect.attrib[key]) for key in ("x", "y", "width", "height")}
        assert place["x"] <= x <= place["x"] + place["width"]
        assert place["y"] <= y <= place["y"] + place["height"]


def test_ticks_of_the_axes_are_round_values_and_fewer_on_a_phone() -> None:
    chart = replace(EMPTY, x=AxisRange(low=0, high=1000))
    wide, narrow = parse_drawings(embed(chart, LARGE, SMALL))
    assert (
        texts(narrow) == ["0", "500", "1,000", "step", "0", "0.2", "0.4", "0.6", "0.8", "1.0"][:4] + texts(narrow)[4:]
    )
    assert texts(wide)[:7] == ["0", "200", "400", "600", "800", "1,000", "step"]
    assert texts(wide)[7:] == texts(narrow)[4:] == ["0", "0.5", "1.0"]


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize("high", [2e-5, 3.0, 123_456.0, 9.9e8, 3e90])
def test_labels_are_within_the_drawing(high: float, is_log: bool) -> None:
    y = AxisRange(low=high / 1e4, high=high, is_log=is_log)
    with drawing_style():
        figure = draw_line_chart(replace(EMPTY, y=y), SMALL)
        figure.draw_without_rendering()
        drawn, whole = figure.get_tightbbox(), figure.bbox_inches
    assert drawn.x0 >= 0
    assert drawn.y0 >= 0
    assert drawn.x1 <= whole.x1
    assert drawn.y1 <= whole.y1
