"""Run untrusted code from a file, such as a template or a pickle, within limits of time and memory.

A signal ends what takes too long. What takes too much memory has to be refused it: one operation, such as a text times
a billion, takes it all before anything can be counted. So the whole process may grow by no more than some meanwhile.
Other threads are under the same limit, which is why it has to be a wide one.

Python looks at signals between operations of its own. One operation that does not end, or that overflows the stack, is
found by running it in a copy of the process first; what passes that is ended together with the process.
"""

import faulthandler
import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import FrameType
from typing import TypeVar

from qlora_cli.units import MIB

Result = TypeVar("Result")

AGAIN_SECONDS = 0.5  # a time-out that falls into a destructor is lost, so that it is repeated
PAGES = "/proc/self/statm"
STACK_BYTES = 4 * MIB  # of a thread, of which a pool may start one for each core at any time
DATA_PAGES = 5  # which number there counts what RLIMIT_DATA limits; CUDA's reservations are not in it

# Of processor time, for each core, which other threads of the process may keep busy meanwhile.
LAST_SECONDS = 8.0
WAITING_SECONDS = 20.0  # for a copy that gets no processor time
# SIGKILL is what the system sends where memory is at its end.
FATAL = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL", "SIGKILL")


class UnsafeCodeError(Exception):
    """The code would crash the process, or never end; the message says how."""


class TimeLimitError(Exception):
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

    One operation that does not end, and so can't be interrupted, ends the process by SIGPROF.

    Raises:
        TimeLimitError: it takes longer than `most_seconds`.
    """
    if not _is_main_thread() or not hasattr(signal, "setitimer"):
        return call()
    has_last_resort = _start_last_resort(most_seconds)
    try:
        return _interrupted(call, most_seconds, signal.ITIMER_REAL, signal.SIGALRM)
    finally:
        if has_last_resort:
            signal.setitimer(signal.ITIMER_PROF, 0)


def _interrupted(call: Callable[[], Result], most_seconds: float, timer: int, alarm: int) -> Result:
    """Return what `call` returns, unless `alarm` comes from `timer` before."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise TimeLimitError

    before = signal.signal(alarm, end)
    signal.setitimer(timer, most_seconds, AGAIN_SECONDS)
    try:
        try:
            return call()
        finally:
            signal.setitimer(timer, 0)
    except TimeLimitError:  # which may have come in the line above
        signal.setitimer(timer, 0)
        raise
    finally:
        signal.signal(alarm, signal.SIG_DFL if before is None else before)


def try_in_fork(call: Callable[[], object], most_seconds: float, most_operation_seconds: float) -> None:
    """Run `call` for `most_seconds` of processor time in a copy of this process; what it returns or raises is lost.

    Where no copy can be made of a process, or it gets no processor time, nothing is found. Other threads do not run in
    the copy, so `call` must not wait for any.

    Raises:
        UnsafeCodeError: the copy died of it, or one operation ran for `most_operation_seconds` of processor time.
    """

    if not _is_main_thread() or not hasattr(os, "fork"):
        return

    def run() -> None:
        signal.setitimer(signal.ITIMER_PROF, most_seconds + most_operation_seconds)
        _interrupted(call, most_seconds, signal.ITIMER_VIRTUAL, signal.SIGVTALRM)

    ours, theirs = Pipe(duplex=False)
    with ours:
        with theirs:
            number = _fork_to_run(run, theirs)
        ended_by = None if number is None else _end_of(number, ours)
    if ended_by == "SIGPROF":
        raise UnsafeCodeError("one operation of it does not end")
    if ended_by in FATAL:
        raise UnsafeCodeError(f"it ends the process by {ended_by}, as nesting without an end does")


def _fork_to_run(call: Callable[[], object], answer: Connection) -> int | None:
    """Return the number of a copy of the process that runs `call` and then answers; None if none can be made."""
    # A signal that came to the copy before its handlers are gone would run what the original does on its way out.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        with warnings.catch_warnings():  # from Python 3.12 on; the copy waits for no other thread
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
            number = os.fork()
        if number == 0:
            _run_and_exit(call, answer)
    except OSError:  # too many processes, or too little memory for one more
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return number


def _run_and_exit(call: Callable[[], object], answer: Connection) -> None:
    try:
        import resource  # not on Windows

        faulthandler.disable()  # the original says what happened
        faulthandler.unregister(signal.SIGPROF)
        gc.disable()  # it would touch, and so copy, all memory
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPROF):
            signal.signal(number, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        with suppress(Exception):  # the original meets it too, if it runs the same
            call()
        answer.send_bytes(b"lives")
    finally:
        os._exit(0)


def _end_of(number: int, answer: Connection) -> str | None:
    """Return the name of the signal that ended the copy `number`; None if it answers, or has not within some time."""
    has_died = False
    try:
        if answer.poll(WAITING_SECONDS):
            answer.recv_bytes()
    except EOFError:
        has_died = True
    finally:  # on Ctrl-C too
        if not has_died:
            _kill(number)
        ended_by = _waited(number)
    return ended_by if has_died else None


def _kill(number: int) -> None:
    with suppress(ProcessLookupError):  # where children are waited for by nobody, it may be gone
        os.kill(number, signal.SIGKILL)


def _waited(number: int) -> str | None:
    """Return the name of the signal that ended a process, once it has ended; None if it was none."""
    try:
        status = os.waitpid(number, 0)[1]
    except ChildProcessError:  # as where SIGCHLD is ignored
        return None
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else None


def _start_last_resort(most_seconds: float) -> bool:
    """Have the process end itself unless the timer is stopped; return whether, as a profiler's own is left alone."""
    if signal.getsignal(signal.SIGPROF) != signal.SIG_DFL:
        return False
    _show_where_it_ends()
    signal.setitimer(signal.ITIMER_PROF, (most_seconds + LAST_SECONDS) * _num_cores())
    return True


@cache
def _show_where_it_ends() -> None:
    if sys.__stderr__ is not None:
        faulthandler.register(signal.SIGPROF, file=sys.__stderr__, all_threads=False, chain=True)


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
