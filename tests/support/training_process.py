"""A run in a process of its own, forked from one that has imported everything, to be killed or sent signals."""

import multiprocessing
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

INTERRUPTED = 77  # what a run that a signal stopped exits with here
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


class SignalAt(Recorder):
    """Sends this process a signal when an event of a kind and step is reported."""

    def __init__(self, kind: type, step: int) -> None:
        super().__init__()
        self._kind, self._step = kind, step

    def report(self, event: Any) -> None:
        super().report(event)
        if isinstance(event, self._kind) and event.step == self._step:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGTERM)


def _train(settings: Resolved[TrainSettings], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    result = train(settings, Recorder())
    sys.exit(0 if result.interrupted_by is None else INTERRUPTED)


def start_training(settings: Resolved[TrainSettings], log: Path) -> BaseProcess:
    """Start a run; what it prints is appended to `log`. It exits with 0, or `INTERRUPTED` if a signal stopped it."""
    process = FORKS.Process(target=_train, args=(settings, log))
    process.start()
    return process
