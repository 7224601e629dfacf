"""Show progress on stderr: a live display on a terminal, plain lines elsewhere."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import IO, cast

from qlora_cli.cli.console import TextConsole
from qlora_cli.cli.progress.live_display import LiveReporter
from qlora_cli.cli.progress.plain_lines import PlainReporter
from qlora_cli.cli.robust_stream import RobustStream
from qlora_cli.events import Reporter


@contextmanager
def reporting() -> Iterator[Reporter]:
    """Yield the reporter for the kind of stderr, and restore the terminal at the end."""
    if sys.stderr is None:  # closed by `2>&-`
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            yield PlainReporter(nowhere)
        return
    console = TextConsole(cast(IO[str], RobustStream(sys.stderr)))
    # stdout is for the result: output of trackers goes to stderr, like progress.
    if not sys.stderr.isatty() or console.is_dumb_terminal:  # such as TERM=dumb, which can't redraw
        with redirect_stdout(sys.stderr):
            yield PlainReporter(sys.stderr)
        return
    reporter = LiveReporter(console)
    with reporter.live:
        yield reporter
