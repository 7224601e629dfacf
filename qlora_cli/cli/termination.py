"""SIGTERM as an error, so that what is half written is taken away before the process ends with 143."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qlora_cli.errors import TerminatedError


class _Terminated(BaseException):
    """Passes whatever catches exceptions on the way, as Ctrl-C does."""


@contextmanager
def terminated_cleanly() -> Iterator[None]:
    """End by an error when SIGTERM comes; the handler that was there is put back.

    Raises:
        TerminatedError: it came.
    """

    def end(_: int, __: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except _Terminated:
        raise TerminatedError("terminated by SIGTERM", hint="The same command begins anew.") from None
    finally:
        signal.signal(signal.SIGTERM, before)
