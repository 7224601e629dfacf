"""Run what a file of others brings along, a program or a pickle, within seconds and within some memory.

A signal ends what takes too long. What takes too much memory has to be refused it: one operation, such as a text times
a billion, takes it all before anything can be counted. So the whole process may grow by no more than some meanwhile.
Other threads are under the same limit, which is why it has to be a wide one.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import cache
from types import FrameType
from typing import TypeVar

from qlora_cli.units import MIB

Result = TypeVar("Result")

AGAIN_SECONDS = 0.5  # a time-out that falls into a destructor is lost, so that it is repeated
PAGES = "/proc/self/statm"
STACK_BYTES = 4 * MIB  # of a thread, of which a pool may start one for each core at any time
DATA_PAGES = 5  # which number there counts what RLIMIT_DATA limits; CUDA's reservations are not in it


class TimeOutError(Exception):
    """The time is over."""


def within_bytes(call: Callable[[], Result], most_bytes: int) -> Result:
    """Return what `call` returns, while the process grows by at most `most_bytes` and the stacks of some threads.

    On Linux alone, and in the main thread: elsewhere without a limit.

    Raises:
        MemoryError: it takes more.
    """
    if sys.platform != "linux" or not _is_main_thread():
        return call()
    import resource  # not on Windows

    before = resource.getrlimit(resource.RLIMIT_DATA)
    others = [limit for limit in before if limit != resource.RLIM_INFINITY]
    used = _pages_of_data() * resource.getpagesize()
    limit = min([used + most_bytes + STACK_BYTES * _num_cores(), *others])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        return call()
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def within_seconds(call: Callable[[], Result], most_seconds: float) -> Result:
    """Return what `call` returns; where signals can't be handled, which is outside of the main thread, without limit.

    Raises:
        TimeOutError: it takes longer than `most_seconds`.
    """
    if not _is_main_thread() or not hasattr(signal, "setitimer"):
        return call()

    def end(_number: int, _frame: FrameType | None) -> None:
        raise TimeOutError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, most_seconds, AGAIN_SECONDS)
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


@cache
def _num_cores() -> int:
    return os.cpu_count() or 1


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _pages_of_data() -> int:
    file = os.open(PAGES, os.O_RDONLY)  # for each row of a data set: a third of what Path.read_bytes takes
    try:
        return int(os.read(file, 256).split()[DATA_PAGES])
    finally:
        os.close(file)
