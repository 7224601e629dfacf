"""A run in a process of its own, forked from one that has imported everything, to be killed or sent signals."""

import itertools
import os
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.training.train_run import train
from tests.conftest import Recorder
from tests.support.processes.forks import redirect, start_process

INTERRUPTED = 77  # the exit code of a run that a signal stopped


class SignalAt(Recorder):
    """Sends this process a signal when an event of a certain kind and step is reported."""

    def __init__(self, kind: type, step: int) -> None:
        super().__init__()
        self._kind, self._step = kind, step

    def report(self, event: Any) -> None:
        super().report(event)
        if isinstance(event, self._kind) and event.step == self._step:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGTERM)


def _train(settings: Resolved[TrainSettings], log: Path, deadly_write: int | None) -> None:
    redirect(log, log)
    if deadly_write is not None:
        _die_at_write(deadly_write)
    result = train(settings, Recorder())
    sys.exit(0 if result.interrupted_by is None else INTERRUPTED)


def _die_at_write(number: int) -> None:
    """Kill this process when it touches an incomplete checkpoint for the `number`-th time."""
    numbers = itertools.count(1)

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        touches_files = event == "open" or event.startswith(("os.", "shutil."))
        if touches_files and any(".saving" in str(one) for one in arguments) and next(numbers) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def start_training(settings: Resolved[TrainSettings], log: Path, deadly_write: int | None = None) -> BaseProcess:
    """Start a run, whose output is appended to `log`. It exits with 0, or `INTERRUPTED` if a signal stopped it.

    `deadly_write` kills it from within, when it touches a checkpoint that is being written for that many-th time.
    """
    return start_process(_train, settings, log, deadly_write)
