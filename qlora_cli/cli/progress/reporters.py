"""Show a run in progress, on stderr: a live display on a terminal, plain lines elsewhere."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import IO, cast

from qlora_cli.cli.console import TextConsole
from qlora_cli.cli.lasting_stream import LastingStream
from qlora_cli.cli.progress.live_display import LiveReporter
from qlora_cli.cli.progress.plain_lines import PlainReporter
from qlora_cli.events import Reporter


@contextmanager
def reporting() -> Iterator[Reporter]:
    """Give the reporter that fits stderr, and leave the terminal as it was."""
    if sys.stderr is None:  # closed by `2>&-`
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            yield PlainReporter(nowhere)
        return
    console = TextConsole(cast(IO[str], LastingStream(sys.stderr)))
    # stdout is for the result: what trackers print while they run goes where progress goes.
    if not sys.stderr.isatty() or console.is_dumb_terminal:  # such as TERM=dumb, which can't redraw
        with redirect_stdout(sys.stderr):
            yield PlainReporter(sys.stderr)
        return
    reporter = LiveReporter(console)
    with reporter.live:
        yield reporter
