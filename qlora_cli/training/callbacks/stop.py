"""Requests to a running job: to stop, by Ctrl-C, SIGTERM or SIGHUP, or to save a checkpoint, by a file."""

import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_cli.events import Noted, Reporter
from qlora_cli.ranks.group import ALONE, ProcessGroup, outlive_launcher

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the terminal was closed, or the connection lost


class StoppedError(Exception):
    """A signal came during an evaluation, which is not completed."""


class StopSignal:
    """A context that records the first stop signal instead of ending the process, and restores the handlers.

    The effect of a signal is reported at once: a step may take minutes. A second one, except SIGHUP, ends the process,
    and so does the first one before training has begun, when there is nothing to save.

    Several processes act on a signal once they have agreed on it, all at the same place. If their launcher has ended,
    which would end them all, they stop as if it had sent SIGTERM. One of them that fails
    ignores SIGTERM from then on, which a launcher sends to it while it records why.

    Attributes:
        has_begun: Whether a step of this process has begun.
        received: The name of the first signal to this process.
    """

    def __init__(self, reporter: Reporter, group: ProcessGroup = ALONE) -> None:
        self.received: str | None = None
        self.has_begun = False
        self._agreed: str | None = None
        self._reporter = reporter
        self._group = group
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def name(self) -> str | None:
        """The name of the signal to act on."""
        return self.received if self._group.size == 1 else self._agreed

    def agree(self) -> None:
        """Take the signal to any process for one to all; called by all at the same place."""
        if self._group.size > 1:
            if self.received is None and self._group.has_lost_launcher:
                self._receive(signal.SIGTERM, "the launcher of this run has ended")
            signals = [name for name in self._group.exchange(self.received) if name is not None]
            self._agreed = next(iter(signals), None)

    def __enter__(self) -> "StopSignal":
        # Python delivers signals to the main thread only, and only there may handlers be set.
        if threading.current_thread() is threading.main_thread():
            # A signal that is ignored stays ignored: under nohup a run outlives its terminal.
            handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if error is not None:
            outlive_launcher(self._group)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature is Python's
        if self.received is not None:
            if number == signal.SIGHUP:  # for a closed terminal, shell and kernel send one each
                return
            sys.exit(128 + number)  # a second request: exit at once
        name = signal.Signals(number).name
        if not self.has_begun:
            self._reporter.report(Noted(level="warning", message=f"{name}: ended before the first step"))
            sys.exit(128 + number)
        self._receive(signal.Signals(number), name)

    def _receive(self, number: signal.Signals, cause: str) -> None:
        self.received = number.name
        again = "again" if cause == number.name and number != signal.SIGHUP else "SIGTERM"
        message = f"{cause}: training stops after the step in progress, with a checkpoint; {again} to leave at once"
        self._reporter.report(Noted(level="warning", message=message))


class StopCallback(TrainerCallback):
    """Saves a checkpoint and leaves the loop at the end of the step in which a signal came.

    If the file `request` exists, saves a checkpoint, continues, and deletes the file when it is complete; without one
    (None), another process does.
    """

    def __init__(self, stop: StopSignal, request: Path | None) -> None:
        self._stop = stop
        self._request = request

    def on_step_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the signatures are those of transformers
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Let a signal wait for the end of the step from now on."""
        self._stop.has_begun = True

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Pass the requests on to the trainer."""
        self._stop.agree()
        if self._stop.name is not None:
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False
        if self._request is not None and self._request.is_file():
            control.should_save = True

    def on_save(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Delete the request: the checkpoint is complete."""
        if self._request is not None and self._request.is_file():
            self._request.unlink()

    def on_prediction_step(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Leave an evaluation.

        Raises:
            StoppedError: a signal came.
        """
        self._stop.agree()
        if self._stop.name is not None:
            raise StoppedError
