"""A live display leaves no row of an earlier frame behind, however its window is resized."""

from collections.abc import Callable

import numpy as np
import pytest
from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from qlora_cli.cli.progress.resized_display import ResizedLive
from tests.support.processes.reflowing_terminal import ReflowingTerminal

NOTE = "note: " + "a long note that a narrow window breaks " * 3


class Window(Console):
    """A console of the width of a terminal, whatever the environment says."""

    def __init__(self, terminal: ReflowingTerminal) -> None:
        super().__init__(file=terminal, force_terminal=True, width=terminal.width, height=60)  # type: ignore[arg-type]
        self._terminal = terminal

    def resize(self, width: int) -> None:
        self._terminal.resize(width)
        self.width = width


def frame(console: Console) -> RenderableType:
    return Text("\n".join(["=" * console.width, "-" * (console.width // 2), "loss 1.0", ""]), no_wrap=True)


def shown(live_of: Callable[[Window], Live], widths: list[int], notes_at: set[int]) -> tuple[list[str], Window]:
    terminal = ReflowingTerminal(widths[0])
    window = Window(terminal)
    live = live_of(window)
    live.start()
    try:
        for number, width in enumerate(widths[1:]):
            window.resize(width)
            live.console.print(Text(NOTE), soft_wrap=True) if number in notes_at else live.refresh()
        return terminal.rows(), window
    finally:
        live.stop()


def resized(window: Window) -> Live:
    return ResizedLive(lambda: frame(window), window)


def of_rich(window: Window) -> Live:
    return Live(get_renderable=lambda: frame(window), console=window, auto_refresh=False, transient=True)


@pytest.mark.parametrize("seed", range(30))
def test_only_notes_and_the_last_frame_are_shown_after_any_resizing(seed: int) -> None:
    draw = np.random.default_rng(seed)
    widths = [int(width) for width in draw.integers(12, 141, 8)]
    notes_at = {number for number in range(7) if draw.random() < 0.3}
    rows, window = shown(resized, widths, notes_at)
    in_a_line = "".join(row.ljust(1) for row in rows)
    assert rows[-3:] == ["=" * window.width, "-" * (window.width // 2), "loss 1.0"]
    assert in_a_line.count("=") == window.width
    assert in_a_line.count("-") == window.width // 2
    assert "".join(rows[:-3]).replace(" ", "") == (NOTE * len(notes_at)).replace(" ", "")


def test_rich_alone_leaves_rows_of_earlier_frames() -> None:
    rows, window = shown(of_rich, [100, 40, 25], set())
    assert "".join(rows).count("=") > window.width
