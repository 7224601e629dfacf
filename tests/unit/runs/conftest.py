"""Report pages with their charts, each different chart drawn once."""

import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from qlora_cli.charts.line_chart import embedded_line_chart
from qlora_cli.runs.report import run_page


@pytest.fixture(scope="module", autouse=True)
def _equal_charts_drawn_once() -> Iterator[None]:
    """Draw a chart once in a module: most of what is changed in a run changes none, or one of five."""
    drawn: dict[bytes, str] = {}

    def drawn_chart(*arguments: Any, **named: Any) -> str:
        key = pickle.dumps((arguments, named))
        if key not in drawn:
            drawn[key] = embedded_line_chart(*arguments, **named)
        return drawn[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_page, "embedded_line_chart", drawn_chart)
        yield
