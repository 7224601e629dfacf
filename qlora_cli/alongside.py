"""Compute something in a forked process, on a second core, while this one goes on."""

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from typing import TypeVar

from qlora_cli.bounded import FINISHED, fork_to_run, kill, wait_for_exit

Result = TypeVar("Result")


@contextmanager
def alongside(compute: Callable[[], Result]) -> Iterator[Callable[[], Result]]:
    """Start `compute` in a forked process; yield what waits for its result, and may be called once.

    Where there is no second core or no fork, or the fork fails or dies, `compute` runs in this process when its result
    is asked for; so its exceptions are raised there. It must have no effect but its result, which is pickled, and wait
    for no other thread. The fork ends with the context.
    """
    if sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2:
        yield compute
        return
    receiver, sender = Pipe(duplex=False)
    with receiver:
        with sender:
            pid = fork_to_run(lambda: sender.send_bytes(pickle.dumps(compute())), sender)

        def result() -> Result:
            with suppress(EOFError):  # nothing was sent: it died
                if (message := receiver.recv_bytes()) != FINISHED:
                    computed: Result = pickle.loads(message)  # noqa: S301 - from our own fork
                    return computed
            return compute()

        try:
            yield result
        finally:
            if pid is not None:
                kill(pid)
                wait_for_exit(pid)
