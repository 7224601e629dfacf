"""Run a process of the GPU suite until it ends or a deadline passes, and lose nothing of what it said."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from benchmarks.records import ROOT

SECONDS_TO_SAY_WHERE = 3.0
# Packages that were put before what is installed stay there.
PYTHON_PATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
ENVIRONMENT = {"PYTHONPATH": PYTHON_PATH, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


class Deadline:
    """The moment by which everything has to be done."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        """Seconds until then, at least 0."""
        return max(0.0, self._end - time.monotonic())


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A process that ended, or was ended because its time was up; `errors` is the end of what it wrote to stderr."""

    exit_code: int
    timed_out: bool
    seconds: float
    errors: str


def run_until(
    command: Sequence[str],
    *,
    seconds: float,
    stop_signal: signal.Signals = signal.SIGUSR1,
    grace_seconds: float = SECONDS_TO_SAY_WHERE,
) -> Ended:
    """Run `command` for at most so many seconds.

    Then it gets `stop_signal`, at which it may report where it is, and after `grace_seconds` it is killed, together
    with all that it started. Its stdout is that of this process.
    """
    start = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stderr=errors, env={**os.environ, **ENVIRONMENT}, start_new_session=True)
        try:
            timed_out = not _ends_within(process, seconds)
            if timed_out:
                process.send_signal(stop_signal)
                _ends_within(process, grace_seconds)
        finally:
            with suppress(ProcessLookupError):  # whatever it started is in its group
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        errors.seek(0)
        return Ended(
            exit_code=process.returncode,
            timed_out=timed_out,
            seconds=time.monotonic() - start,
            errors=errors.read().decode(errors="replace"),
        )


def _ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True
