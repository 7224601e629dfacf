"""A stream for long runs, which continue when its reader or terminal is gone, or its disk is full."""

import errno
import os
from collections.abc import Callable, Iterator
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
    """Writes to `file`, and discards what can't be written: no reader, no terminal, a full disk.

    The handler of a signal may write while `file` is being written, which a buffer refuses with a `RuntimeError`. What
    it writes bypasses the buffer.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._is_busy = False

    def write(self, text: str) -> int:
        """Write `text` if possible."""
        if self._is_busy or not self._tried(lambda: self._file.write(text)):
            with suppress(OSError):
                os.write(self._file.fileno(), text.encode(self._file.encoding or "utf-8", "backslashreplace"))
        return len(text)

    def flush(self) -> None:
        """Flush if possible."""
        if not self._is_busy:
            self._tried(self._file.flush)

    def _tried(self, action: Callable[[], object]) -> bool:
        """Write or flush if possible; return False if the file is being written by somebody else."""
        self._is_busy = True
        try:
            action()
        except OSError as error:
            self._give_up(error)
        except RuntimeError:  # written by a function that this handler of a signal interrupts
            return False
        finally:
            self._is_busy = False
        return True

    def _give_up(self, error: OSError) -> None:
        if error.errno == errno.EIO:  # the terminal is gone: libraries that print must not fail either
            redirect_to_null(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
