"""Run a program of llama.cpp as a child process, which ends when we do."""

import os
import signal
import subprocess
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

LAST_LINES = 12
KILL_SECONDS = 5
VARIABLES = {
    "HF_HUB_OFFLINE": "1",  # everything that it needs is on the disk
    "GGML_NO_BACKTRACE": "1",  # its last lines say why the library aborts, unless a debugger adds pages to them
}


def run_to_end(command: Sequence[str]) -> tuple[int, list[str]]:
    """Run `command` to its end; return its exit code and its last lines of output. On any exception it is ended."""
    process = subprocess.Popen(  # noqa: S603 - a list of arguments, no shell
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **VARIABLES},
        start_new_session=True,  # Ctrl-C reaches only us, and its children can be ended with it
    )
    assert process.stdout is not None, "it is a pipe"
    try:
        lines = deque((line.rstrip() for line in process.stdout if line.strip()), maxlen=LAST_LINES)
        return process.wait(), list(lines)
    finally:
        process.stdout.close()
        _terminate(process)


def _terminate(process: subprocess.Popen[str]) -> None:
    """Terminate `process` and its children if it still runs; kill them if that does not help."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with suppress(ProcessLookupError):  # it ended just now
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=KILL_SECONDS)


def described_failure(program: str, code: int, lines: Sequence[str]) -> str:
    """Return how `program` failed, with its last lines."""
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    output = "\n".join(f"  | {line}" for line in lines) or "  | (it wrote nothing)"
    return f"{program} {how}; its last lines:\n{output}"
