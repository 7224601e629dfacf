"""Run untrusted code from a file, such as a template or a pickle, within limits of time and memory.

A signal interrupts what takes too long. Memory has to be limited beforehand: a single operation, such as a string
times a billion, would take it all before anything could be measured. So the growth of the whole process is limited
meanwhile; the limit applies to other threads too, and is generous for that reason.

Python handles signals only between its own operations. A single operation that does not end, or overflows the stack,
is detected by running the code in a forked process first; if it passes there, the last resort is to end this process.
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

REPEAT_SECONDS = 0.5  # an exception that is raised in a destructor is lost, so the signal is repeated
PAGES = "/proc/self/statm"
STACK_BYTES = 4 * MIB  # of a thread; a pool may start one for each core at any time
DATA_PAGES = 5  # the field there that RLIMIT_DATA limits; it does not count CUDA's reservations

# CPU time for each core, because other threads of the process may be busy meanwhile.
LAST_RESORT_SECONDS = 8.0
WAITING_SECONDS = 20.0  # for a forked process that gets no CPU time
FINISHED = b"finished"  # what a fork sends after its call, whether that raised an exception or not
# The system sends SIGKILL when it runs out of memory.
FATAL = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL", "SIGKILL")


class UnsafeCodeError(Exception):
    """The code would crash the process, or never end; the message says which."""


class TimeLimitError(Exception):
    """The code exceeded its time limit."""


def within_bytes(call: Callable[[], Result], max_bytes: int) -> Result:
    """Return the result of `call`, while the process may grow by `max_bytes` and the stacks of some threads.

    The limit applies on Linux and in the main thread only.

    Raises:
        MemoryError: the call needs more.
    """
    if sys.platform != "linux" or not _is_main_thread():
        return call()
    import resource  # not on Windows

    before = resource.getrlimit(resource.RLIMIT_DATA)
    finite = [limit for limit in before if limit != resource.RLIM_INFINITY]
    used = _num_data_pages() * resource.getpagesize()
    limit = min([used + max_bytes + STACK_BYTES * _num_cores(), *finite])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        return call()
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def within_seconds(call: Callable[[], Result], max_seconds: float) -> Result:
    """Return the result of `call`; outside of the main thread, which alone handles signals, without a limit.

    If a single operation does not end, and so can't be interrupted, SIGPROF ends the process.

    Raises:
        TimeLimitError: the call takes longer than `max_seconds`.
    """
    if not _is_main_thread() or not hasattr(signal, "setitimer"):
        return call()
    has_last_resort = _start_last_resort(max_seconds)
    try:
        return _call_with_timer(call, max_seconds, signal.ITIMER_REAL, signal.SIGALRM)
    finally:
        if has_last_resort:
            signal.setitimer(signal.ITIMER_PROF, 0)


def _call_with_timer(call: Callable[[], Result], max_seconds: float, timer: int, alarm: int) -> Result:
    """Return the result of `call`; interrupt it by the signal `alarm` when `timer` expires."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise TimeLimitError

    before = signal.signal(alarm, interrupt)
    signal.setitimer(timer, max_seconds, REPEAT_SECONDS)
    try:
        try:
            return call()
        finally:
            signal.setitimer(timer, 0)
    except TimeLimitError:  # possibly raised in the line above
        signal.setitimer(timer, 0)
        raise
    finally:
        signal.signal(alarm, signal.SIG_DFL if before is None else before)


def try_in_fork(call: Callable[[], object], max_seconds: float, max_operation_seconds: float) -> None:
    """Run `call` for up to `max_seconds` of CPU time in a forked process; its result or exception is discarded.

    If the process can't be forked, or the fork gets no CPU time, nothing is detected. Other threads do not run in the
    fork, so `call` must not wait for any.

    Raises:
        UnsafeCodeError: the fork died, or a single operation ran for `max_operation_seconds` of CPU time.
    """

    if not _is_main_thread() or not hasattr(os, "fork"):
        return

    def run() -> None:
        signal.setitimer(signal.ITIMER_PROF, max_seconds + max_operation_seconds)
        _call_with_timer(call, max_seconds, signal.ITIMER_VIRTUAL, signal.SIGVTALRM)

    receiver, sender = Pipe(duplex=False)
    with receiver:
        with sender:
            pid = fork_to_run(run, sender)
        ended_by = None if pid is None else _wait_for_fork(pid, receiver)
    if ended_by == "SIGPROF":
        raise UnsafeCodeError("one operation of it does not end")
    if ended_by in FATAL:
        raise UnsafeCodeError(f"it ends the process by {ended_by}, as endless nesting does")


def fork_to_run(call: Callable[[], object], sender: Connection) -> int | None:
    """Fork a process that runs `call` and then sends a message; return its pid, or None if forking fails."""
    # A signal that arrives before the fork has reset its handlers would run the cleanup of this process in it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        with warnings.catch_warnings():  # from Python 3.12 on; the fork waits for no other thread
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            _run_and_exit(call, sender)
    except OSError:  # too many processes, or too little memory for another one
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def _run_and_exit(call: Callable[[], object], sender: Connection) -> None:
    try:
        import resource  # not on Windows

        faulthandler.disable()  # the parent reports what happened
        faulthandler.unregister(signal.SIGPROF)
        gc.disable()  # it would touch, and so copy, all memory
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPROF):
            signal.signal(number, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        with suppress(Exception):  # the parent gets the same exception when it runs the call
            call()
        sender.send_bytes(FINISHED)
    finally:
        os._exit(0)


def _wait_for_fork(pid: int, receiver: Connection) -> str | None:
    """Return the name of the signal that ended a fork; None if it sends a message, or nothing before the time-out."""
    has_died = False
    try:
        if receiver.poll(WAITING_SECONDS):
            receiver.recv_bytes()
    except EOFError:
        has_died = True
    finally:  # on Ctrl-C too
        if not has_died:
            kill(pid)
        ended_by = wait_for_exit(pid)
    return ended_by if has_died else None


def kill(pid: int) -> None:
    """Kill a forked process, if it still runs."""
    with suppress(ProcessLookupError):  # already gone if SIGCHLD is ignored
        os.kill(pid, signal.SIGKILL)


def wait_for_exit(pid: int) -> str | None:
    """Wait for a process to end; return the name of the signal that ended it, or None if none did."""
    try:
        status = os.waitpid(pid, 0)[1]
    except ChildProcessError:  # SIGCHLD is ignored
        return None
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else None


def _start_last_resort(max_seconds: float) -> bool:
    """Start a timer that ends the process; return whether it was started, because a profiler may use the signal."""
    if signal.getsignal(signal.SIGPROF) != signal.SIG_DFL:
        return False
    _dump_traceback_on_sigprof()
    signal.setitimer(signal.ITIMER_PROF, (max_seconds + LAST_RESORT_SECONDS) * _num_cores())
    return True


@cache
def _dump_traceback_on_sigprof() -> None:
    if sys.__stderr__ is not None:
        faulthandler.register(signal.SIGPROF, file=sys.__stderr__, all_threads=False, chain=True)


@cache
def _num_cores() -> int:
    return os.cpu_count() or 1


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _num_data_pages() -> int:
    descriptor = os.open(PAGES, os.O_RDONLY)  # called for each row of a data set: three times as fast as read_bytes
    try:
        return int(os.read(descriptor, 256).split()[DATA_PAGES])
    finally:
        os.close(descriptor)
