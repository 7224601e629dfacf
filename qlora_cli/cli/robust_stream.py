"""A stream for long runs, which continue when its reader or terminal is gone, or its disk is full."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


@contextmanager
def ignoring_lost_terminal(file: TextIO | None) -> Iterator[None]:
    """Discard what is printed to `file`, stdout or stderr, if its terminal is gone."""
    try:
        yield
        if file is not None:
            file.flush()
    except OSError as error:
        if error.errno != errno.EIO or file is None:
            raise
        redirect_to_null(file)


def redirect_to_null(file: TextIO) -> None:
    """Redirect a stream that can't be written to the null device, with the content of its buffer."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


class RobustStream:
    """Writes to `file`, and discards what can't be written: no reader, no terminal, a full disk."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        """Write `text` if possible."""
        try:
            self._file.write(text)
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Flush if possible."""
        try:
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if error.errno == errno.EIO:  # the terminal is gone: libraries that print must not fail either
            redirect_to_null(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
