"""Ctrl-C and SIGTERM end a run after the step in progress, with a checkpoint; a second one ends it at once."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """While entered, remembers the first stop signal instead of dying of it; restores the handlers after."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        # Python delivers signals to the main thread only, and only there may handlers be set.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature is Python's
        if self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


class StopCallback(TrainerCallback):
    """Saves a checkpoint and leaves the loop at the end of the step in which a signal came."""

    def __init__(self, stop: StopSignal) -> None:
        self._stop = stop

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the signature is that of transformers
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Ask the trainer to save and stop, if a signal came."""
        if self._stop.name is not None:
            control.should_save = True
            control.should_training_stop = True
