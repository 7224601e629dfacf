"""Show progress on stderr: a live display on a terminal, plain lines elsewhere."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import IO, TextIO, cast

from qlora_cli.cli.console import TextConsole
from qlora_cli.cli.progress.live_display import LiveReporter
from qlora_cli.cli.progress.plain_lines import PlainReporter, WarningReporter
from qlora_cli.cli.robust_stream import RobustStream
from qlora_cli.cli.volume import Volume
from qlora_cli.events import PhaseStarted, Reporter
from qlora_cli.garbage import gc_disabled

IMPORTING = PhaseStarted(title="Loading PyTorch and other libraries")  # which takes as long as their disk is slow


@contextmanager
def reporting(volume: Volume = Volume.NORMAL) -> Iterator[Reporter]:
    """Yield the reporter for the kind of stderr, and restore the terminal at the end."""
    if sys.stderr is None:  # closed by `2>&-`
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            yield PlainReporter(nowhere)
        return
    console = TextConsole(cast(IO[str], RobustStream(sys.stderr)))
    # stdout is for the result: output of trackers goes to stderr, like progress.
    if volume != Volume.NORMAL or not sys.stderr.isatty() or console.is_dumb_terminal:  # as TERM=dumb: no redrawing
        with redirect_stdout(sys.stderr):
            yield _plain_reporter(sys.stderr, volume)
        return
    reporter = LiveReporter(console)
    with reporter.live:
        yield reporter


@contextmanager
def importing(reporter: Reporter) -> Iterator[None]:
    """Say that the imports within are what takes time now, and do not search all that they make for garbage.

    None of it is: the searches are a sixth of the time. Later ones leave it out, as does the one at exit.
    """
    is_first = "torch" not in sys.modules
    if is_first:
        reporter.report(IMPORTING)
    with gc_disabled():
        yield
    if is_first:
        gc.freeze()


def _plain_reporter(file: TextIO, volume: Volume) -> Reporter:
    if volume == Volume.QUIET:
        return WarningReporter(file)
    return PlainReporter(file, interval_seconds=0) if volume == Volume.VERBOSE else PlainReporter(file)
