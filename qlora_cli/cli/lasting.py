"""A stream that a run can write to for days: its reader may leave without costing the run its training."""

from contextlib import suppress
from typing import Any, TextIO


class LastingStream:
    """Writes to `file` while that works, and drops what can't be written: no reader, no terminal, a full disk."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        """Write `text` if that can be done."""
        with suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if that can be done."""
        with suppress(OSError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
