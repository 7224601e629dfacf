"""`qlora merge` in a process of its own, forked from one that has everything imported, to be killed or signalled."""

import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

from qlora_cli.cli.app import app
from tests.support.processes.forks import redirect, start_process


def _merge(arguments: list[str], log: Path) -> None:
    redirect(log, log)
    app(["merge", *arguments])
    sys.exit(0)


def start_merge(*arguments: str | Path, log: Path) -> BaseProcess:
    """Start the command, whose output is appended to `log`."""
    return start_process(_merge, [str(argument) for argument in arguments], log)
