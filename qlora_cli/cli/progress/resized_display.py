"""A live display that leaves nothing behind when the window becomes narrower.

Rich goes up as many rows as it has written. In a narrower window, terminals break the lines that are already there
anew (VTE, kitty, iTerm2, Windows Terminal, tmux and others), so that they take more rows, of which it leaves some.
"""

import math
from collections.abc import Callable, Sequence

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderResult
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType, Segment


class Frame:
    """What a display shows, which remembers the widths of the lines that it was last drawn in, in columns."""

    def __init__(self, draw: Callable[[], RenderableType]) -> None:
        self._draw = draw
        self.widths: Sequence[int] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines."""
        lines = console.render_lines(self._draw(), options, pad=False)
        self.widths = [Segment.get_line_length(line) for line in lines]
        for line in lines:
            yield from line
            yield Segment.line()

    def num_more_rows(self, width: int) -> int:
        """Return how many more rows than lines the frame takes in a window of `width` columns."""
        return sum(max(1, math.ceil(line / width)) - 1 for line in self.widths)


class ResizedLive(Live):
    """A live display that first erases the rows which a narrower window has added to the last frame."""

    def __init__(self, draw: Callable[[], RenderableType], console: Console) -> None:
        self._frame = Frame(draw)
        super().__init__(get_renderable=lambda: self._frame, console=console, refresh_per_second=8, transient=True)

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Put before what is printed what erases the last frame."""
        erased = [(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)] * self._frame.num_more_rows(
            self.console.width
        )
        return [Control(*erased), *super().process_renderables(renderables)]
