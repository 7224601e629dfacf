"""`qlora merge` in a process of its own, forked from one that has imported all, to be killed or sent signals."""

import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

from qlora_cli.cli.app import app
from qlora_cli.merging import merge_run
from tests.support.training_process import FORKS

FORKS.set_forkserver_preload([__name__, merge_run.__name__])


def _merge(arguments: list[str], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    app(["merge", *arguments])
    sys.exit(0)


def start_merge(*arguments: str | Path, log: Path) -> BaseProcess:
    """Start the command; what it prints is appended to `log`."""
    process = FORKS.Process(target=_merge, args=([str(argument) for argument in arguments], log))
    process.start()
    return process
