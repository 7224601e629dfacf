"""A stream that a run can write to for days: its reader may leave without costing the run its training."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


@contextmanager
def dropped_without_terminal(file: TextIO | None) -> Iterator[None]:
    """Drop what is printed to `file`, stdout or stderr, when that was a terminal that is gone."""
    try:
        yield
        if file is not None:
            file.flush()
    except OSError as error:
        if error.errno != errno.EIO or file is None:
            raise
        let_go(file)


def let_go(file: TextIO) -> None:
    """Turn a stream that can't be written to into one that drops everything, also what is in its buffer."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


class LastingStream:
    """Writes to `file` while that works, and drops what can't be written: no reader, no terminal, a full disk."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        """Write `text` if that can be done."""
        try:
            self._file.write(text)
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Flush if that can be done."""
        try:
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if error.errno == errno.EIO:  # the terminal is gone for good: libraries that print must not fail either
            let_go(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
