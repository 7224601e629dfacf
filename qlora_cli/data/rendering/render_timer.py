"""How long a chat template takes for rows: said once if it is far too long, as each row alone is within its limit."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from qlora_cli.events import Noted, Reporter
from qlora_cli.units import counted

SLOW_SECONDS = 10.0  # of the template alone, over the first rows
SECONDS_PER_ROW = 1.0  # a thousand times what is usual


class Pace:
    """Measures what a chat template takes, and tells `reporter` once if rows take seconds."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._seconds = 0.0
        self._num_rows = 0
        self._is_told = False

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Count what is done meanwhile as time of the template, whether it renders or refuses."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._seconds += time.monotonic() - begin
            if self._seconds > max(SLOW_SECONDS, SECONDS_PER_ROW * self._num_rows) and not self._is_told:
                self._is_told = True
                self._tell()

    def row_done(self) -> None:
        """Count a row whose text is there."""
        self._num_rows += 1

    def _tell(self) -> None:
        message = (
            f"the chat template is slow: {self._seconds:.0f} s so far, with {counted(self._num_rows, 'row')} done; "
            "Ctrl-C stops it within a row too, and --chat-template gives another"
        )
        self._reporter.report(Noted(level="warning", message=message))
