"""What the processes of a run say to each other. Imports no torch."""

import re
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from qlora_cli.errors import OutOfMemoryError, QloraError

Value = TypeVar("Value")
SOURCE = re.compile(r"^\[[^]]*\] ")  # the file and line where gloo noticed it
CLOSED = re.compile("closed by peer|reset by peer|Broken pipe")  # what gloo says of a connection to an ended process
NEXT = "The same command resumes from the last checkpoint, if there is one."


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How one process failed, in the words that it would have ended with."""

    rank: int
    host: str
    message: str
    hint: str | None
    exit_code: int

    @classmethod
    def of(cls, error: Exception, rank: int) -> Self:
        """Return the failure of process `rank` by `error`."""
        known = error if isinstance(error, QloraError) else QloraError(f"{type(error).__name__}: {error}")
        return cls(
            rank=rank, host=socket.gethostname(), message=str(known), hint=known.hint, exit_code=known.exit_code
        )


class PeerError(QloraError):
    """Another process of the run failed, and told why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"process {failure.rank} on {failure.host} failed: {failure.message}", hint=failure.hint)
        self.exit_code = failure.exit_code

    @property
    def ran_out_of_memory(self) -> bool:
        """Whether that process ran out of memory."""
        return self.exit_code == OutOfMemoryError.exit_code


class PeerLostError(QloraError):
    """Another process of the run ended without a word."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"another process of this run ended without a word; it may have been killed ({_said(cause)})")
        self.hint = NEXT


class SumError(QloraError):
    """The gradients of this process could not be summed with those of the others, which wait for it in vain."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"the gradients of all processes could not be summed: {_said(cause)}", hint=NEXT)


def _said(cause: Exception) -> str:
    """Return the sentence of an error of gloo or NCCL that says what happened; gloo adds advice."""
    return SOURCE.sub("", str(cause).split("\n", maxsplit=1)[0]).split(". ", maxsplit=1)[0]


class ProcessGroup:
    """The processes of a run, which all call the same methods in the same order. This one is alone.

    Attributes:
        rank: The number of this process, from 0. The first one reads settings, writes files and reports.
        size: The number of processes.
    """

    rank = 0
    size = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    @property
    def is_first_on_host(self) -> bool:
        """Whether no process of this machine comes before this one."""
        return True

    @property
    def num_on_host(self) -> int:
        """The number of processes on this machine."""
        return 1

    @property
    def shares_weights(self) -> bool:
        """Whether each process holds a part of weights, so that none can compute without the others."""
        return False

    @property
    def has_lost_launcher(self) -> bool:
        """Whether what started this process, and would end it with the others, has ended, as by SIGKILL."""
        return False

    def exchange(self, value: Value) -> list[Value]:
        """Return the values of all processes, by rank.

        Raises:
            PeerError: another process failed since the last exchange.
            PeerLostError: another process ended.
        """
        return [value]

    def add(self, tensors: Sequence[Any]) -> None:
        """Replace each of these tensors, which all processes have in the same shapes, by its sum over all of them.

        Raises:
            PeerLostError: another process ended.
            SumError: that failed otherwise.
        """

    def weights(self) -> Any:
        """Return the processes, as `SharedWeights`, for weights that each holds a part of; there must be several."""
        raise NotImplementedError("one process holds all weights")

    def announce(self, failure: Failure) -> None:
        """Let the next exchange of the other processes fail with `failure`."""

    def wait_for_first(self) -> None:
        """After a failure, wait until the first process has ended: a launcher ends all others with one that ends."""


ALONE = ProcessGroup()


def outlive_launcher(group: ProcessGroup) -> None:
    """Let one of several processes that is ending record and say why.

    torch's launcher sends SIGTERM to those that are left when one has ended, within a tenth of a second.
    """
    if group.size > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def failing_together(group: ProcessGroup) -> Iterator[None]:
    """A context in which an exception of one process ends the others, too, which learn what it was."""
    try:
        yield
    except Exception as error:
        outlive_launcher(group)
        if not isinstance(error, PeerError | PeerLostError | SumError):
            group.announce(Failure.of(error, group.rank))
        if not isinstance(error, PeerLostError | SumError):
            group.wait_for_first()
        raise
