"""SIGTERM and SIGHUP as errors, so that what is half written is taken away before the process ends with 143 or 129."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qlora_cli.errors import TerminatedError

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class _Terminated(BaseException):
    """Passes whatever catches exceptions on the way, as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


@contextmanager
def terminated_cleanly() -> Iterator[None]:
    """End by an error when a signal to end comes; the handlers that were there are put back.

    A signal that is ignored, as SIGHUP is under nohup, stays so.

    Raises:
        TerminatedError: it came.
    """

    def end(number: int, _: FrameType | None) -> None:
        for one in before:
            signal.signal(one, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
        raise _Terminated(number)

    taken = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in taken}
    try:
        yield
    except _Terminated as terminated:
        raise TerminatedError(terminated.number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
