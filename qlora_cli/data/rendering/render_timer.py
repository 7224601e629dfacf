"""Warn once if a chat template is slow over many rows, although each row alone is within its time limit."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from qlora_cli.events import Noted, Reporter
from qlora_cli.units import counted

SLOW_SECONDS = 10.0  # of the template alone, over the first rows
SECONDS_PER_ROW = 1.0  # a thousand times the usual


class RenderTimer:
    """Measures the time of a chat template, and warns `reporter` once if rows take seconds."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._seconds = 0.0
        self._num_rows = 0
        self._has_warned = False

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Count the time of the `with` block, whether the template renders or refuses."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds += time.monotonic() - start
            if self._seconds > max(SLOW_SECONDS, SECONDS_PER_ROW * self._num_rows) and not self._has_warned:
                self._has_warned = True
                self._warn()

    def row_done(self) -> None:
        """Count a row that has been rendered."""
        self._num_rows += 1

    def _warn(self) -> None:
        message = (
            f"the chat template is slow: {self._seconds:.0f} s so far, with {counted(self._num_rows, 'row')} done; "
            "Ctrl-C stops it within a row too, and --chat-template gives another"
        )
        self._reporter.report(Noted(level="warning", message=message))
