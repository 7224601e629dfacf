"""Turn SIGTERM and SIGHUP into errors, so that partial output is deleted before the process ends with 143 or 129."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qlora_cli.errors import TerminatedError

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class _Terminated(BaseException):
    """Not an `Exception`, so that code that catches these does not stop it, as for Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


@contextmanager
def signals_as_errors(then: str = "starts over") -> Iterator[None]:
    """Raise an error when a termination signal arrives; restore the previous handlers at the end.

    A signal that is ignored, as SIGHUP under nohup, stays ignored. `then` says what the same command does next time.

    Raises:
        TerminatedError: a signal arrived.
    """

    def end(number: int, _: FrameType | None) -> None:
        for handled in before:
            signal.signal(handled, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
        raise _Terminated(number)

    taken = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in taken}
    try:
        yield
    except _Terminated as terminated:
        raise TerminatedError(terminated.number, then) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
