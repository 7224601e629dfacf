"""Run what a chat template does within seconds, and within some memory.

A signal ends what takes too long. What takes too much memory has to be refused it: one operation, such as a text times
a billion, takes it all before anything can be counted. So the whole process may grow by no more than some while a
template runs. Other threads are under the same limit meanwhile, which is why it is wide.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from qlora_cli.units import MIB

Result = TypeVar("Result")

LONGEST_SECONDS = 4.0  # for one conversation; they are rendered within milliseconds
AGAIN_SECONDS = 0.5  # a time-out that falls into a destructor is lost, so that it is repeated
MOST_BYTES = 512 * MIB  # for anything that is not there for the sake of long messages
MOST_BYTES_PER_CHARACTER = 32  # of the messages: eight copies of the widest
PAGES = "/proc/self/statm"
DATA_PAGES = 5  # which number there counts what RLIMIT_DATA limits; CUDA's reservations are not in it


class TimeOutError(Exception):
    """The time is over."""


def within_limits(call: Callable[[], Result], num_characters: int = 0) -> Result:
    """Return what `call` returns, which runs a template on messages of `num_characters`.

    Only the main thread can be interrupted, and the limit of memory is the whole process's: elsewhere there is none.

    Raises:
        TimeOutError: it takes too long.
        MemoryError: it takes too much memory; limited on Linux alone.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return call()
    return _within_bytes(lambda: _within_seconds(call), MOST_BYTES + MOST_BYTES_PER_CHARACTER * num_characters)


def _within_bytes(call: Callable[[], Result], most_bytes: int) -> Result:
    if sys.platform != "linux":
        return call()
    import resource  # not on Windows

    before = resource.getrlimit(resource.RLIMIT_DATA)
    others = [limit for limit in before if limit != resource.RLIM_INFINITY]
    limit = min([_pages_of_data() * resource.getpagesize() + most_bytes, *others])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        return call()
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _pages_of_data() -> int:
    file = os.open(PAGES, os.O_RDONLY)  # for each row: a third of what Path.read_bytes takes
    try:
        return int(os.read(file, 256).split()[DATA_PAGES])
    finally:
        os.close(file)


def _within_seconds(call: Callable[[], Result]) -> Result:
    def end(_number: int, _frame: FrameType | None) -> None:
        raise TimeOutError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_SECONDS, AGAIN_SECONDS)
    try:
        try:
            return call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except TimeOutError:  # which may have come in the line above
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)
