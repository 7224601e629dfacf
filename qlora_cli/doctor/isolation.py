"""Run checks so that nothing ends the command: exceptions, crashes of native code, hangs, stray output.

A GPU library built for another processor does not raise but kills the process; a broken driver may never answer. So
checks run in a child process, one at a time, which is replaced if a check crashes it.
"""

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

from qlora_cli.doctor.findings import Outcome, failed

MAX_CHARACTERS = 300
MAX_DETAIL_CHARACTERS = 4000
JOIN_SECONDS = 10

CheckFunction = Callable[..., Outcome]


def attempt(check: CheckFunction, *arguments: object, advice: str) -> Outcome:
    """Return the outcome of a check; an exception is a failure with its text and `advice`."""
    try:
        return check(*arguments)
    except Exception as error:  # noqa: BLE001 - any exception of a check is its finding
        text = without_home(str(error))
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return failed(
            f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:MAX_CHARACTERS],
            advice,
            error=text[:MAX_DETAIL_CHARACTERS],
        )


def without_home(text: str) -> str:
    """Return `text` with `~` instead of the home directory, which contains the user's name."""
    try:
        home = Path.home()
    except RuntimeError:  # a user id without a name has none
        return text
    for path in {str(home), str(home.resolve())}:
        if len(path) > 1:
            text = text.replace(path, "~")
    return text


class Isolation:
    """A child process that runs checks; it is started for the first one."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")  # a fork would inherit what the parent has imported
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None
        self._log = tempfile.TemporaryDirectory(prefix="qlora-doctor-", ignore_cleanup_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()
        self._log.cleanup()

    def run(self, check: CheckFunction, *arguments: object, advice: str, limit_seconds: float) -> Outcome:
        """Return the outcome of a check; if it kills its process, or takes too long, it has failed."""
        connection = self._start()
        try:
            connection.send((check, arguments, advice))
            if connection.poll(limit_seconds):
                outcome = connection.recv()
                assert isinstance(outcome, Outcome)
                return outcome
        except (EOFError, ConnectionError):
            return self._died(advice)
        self._stop()
        return failed(f"no answer in {limit_seconds:.0f} seconds", advice, limit_seconds=limit_seconds)

    def _start(self) -> Connection:
        if self._connection is None:
            parent_end, child_end = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(child_end, self._log_path), daemon=True)
            self._process.start()
            child_end.close()  # otherwise the child's death would go unnoticed
            self._connection = parent_end
        return self._connection

    def _died(self, advice: str) -> Outcome:
        assert self._process is not None
        self._process.join(JOIN_SECONDS)
        code = self._process.exitcode
        self._stop()
        how = f"exit code {code}" if code is None or code >= 0 else signal.Signals(-code).name
        return failed(f"crashed its process ({how})", advice, exit_code=code, last_words=self._last_words())

    def _stop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.join(JOIN_SECONDS)  # a call into a broken driver can't be killed
        self._connection = self._process = None

    @property
    def _log_path(self) -> str:
        return str(Path(self._log.name) / "output")

    def _last_words(self) -> str:
        text = Path(self._log_path).read_text(encoding="utf-8", errors="replace").strip()
        return without_home(text)[-MAX_CHARACTERS:]


def _serve(connection: Connection, log_path: str) -> None:
    """Run checks until the parent closes the connection. Output of libraries, also of native code, goes to a file."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    while True:
        try:
            check, arguments, advice = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        connection.send(attempt(check, *arguments, advice=advice))
