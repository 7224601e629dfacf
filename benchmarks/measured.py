"""Run a program to its end and measure it from outside."""

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A program that ended: what it printed, how long it took and the largest resident set it had.

    `peak_host_bytes` is that of the largest process of the program and of those that it waited for.
    """

    exit_code: int
    stdout: str
    stderr: str
    wall_seconds: float
    cpu_seconds: float
    peak_host_bytes: int


def run_measured(command: Sequence[str], *, environment: Mapping[str, str], timeout_seconds: float) -> Finished:
    """Run `command` and wait for it; it is killed, with its exit code -9, after `timeout_seconds`."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env={**os.environ, **environment})
        timer = threading.Timer(timeout_seconds, process.kill)
        timer.start()
        # Unlike Popen.wait, wait4 tells what this one child used.
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for stream in (stdout, stderr):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
        return Finished(
            exit_code=process.returncode,
            stdout=texts[0],
            stderr=texts[1],
            wall_seconds=time.monotonic() - start,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak_host_bytes=usage.ru_maxrss * 1024,  # Linux counts in KiB
        )


def write_model_in_process(
    python: str,
    size: str,
    output: Path,
    *,
    environment: Mapping[str, str],
    timeout_seconds: float = 300,
) -> float:
    """Make a model of `size` in a process of its own and return the seconds it took.

    Raises:
        RuntimeError: it could not be made.
    """
    command = [python, "-m", "benchmarks.synthetic", "--size", size, "--output", str(output)]
    made = run_measured(command, environment=environment, timeout_seconds=timeout_seconds)
    if made.exit_code != 0:
        raise RuntimeError(f"making the {size} model failed: {made.stderr[-2000:]}")
    return made.wall_seconds
