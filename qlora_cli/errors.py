"""The exceptions of all errors that a user can cause.

Each class carries the exit code of the command that it ends, and also inherits from the standard exception that it
refines, so that library users can catch that. A message says what is wrong, with the value; the hint says what to do
next.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

EXIT_CODES = {
    0: "done",
    1: "failed",
    2: "bad input",
    3: "does not fit in memory",
    128 + signal.SIGHUP: "terminal closed",
    128 + signal.SIGINT: "interrupted",
    128 + signal.SIGTERM: "terminated",
}


def is_panic(error: BaseException) -> bool:
    """Return whether an error is a panic of a Rust library, which is not an `Exception` and can't be imported."""
    return type(error).__name__ == "PanicException" and type(error).__module__ == "pyo3_runtime"


class QloraError(Exception):
    """The base class. `hint` is one sentence or command that helps the user to continue.

    `setting` is the `section.key` whose value is refused, if any; the command line replaces it by where it was given.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, setting: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.setting = setting

    def __str__(self) -> str:
        return self.message if self.setting is None else f"{self.setting}: {self.message}"

    def for_setting(self, setting: str) -> Self:
        """Attribute the error to a setting, unless it is attributed to one already; return the error."""
        self.setting = self.setting or setting
        return self


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A problem with the input: where it is (flag, file and line, key), what is wrong, and what to do."""

    where: str
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class SettingsError(QloraError, ValueError):
    """Flags, the settings file or `--set` are invalid. Carries all problems, not only the first."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems, "an error without a problem"
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


class UsageError(QloraError, ValueError):
    """A command was called with invalid arguments."""

    exit_code = 2


class ModelError(QloraError, ValueError):
    """The model or its tokenizer can't be used as asked."""

    exit_code = 2


class ModelNotFoundError(QloraError, FileNotFoundError):
    """There is no model by that name: no such directory, no such repository, or no access to it."""

    exit_code = 2


class DataError(QloraError, ValueError):
    """A data set can't be read, or a row of it can't be trained on."""

    exit_code = 2


class DatasetNotFoundError(QloraError, FileNotFoundError):
    """No data set by that name."""

    exit_code = 2


class RunNotFoundError(QloraError, FileNotFoundError):
    """There is no run at that path."""

    exit_code = 2


class OutputDirectoryError(QloraError, FileExistsError):
    """The output directory contains other files, or can't be written."""

    exit_code = 2


class DiskSpaceError(QloraError, OSError):
    """The command's output does not fit on the disk. Checked before anything is written."""

    exit_code = 2


class MissingDependencyError(QloraError, ImportError):
    """A setting needs a package that is not installed."""

    exit_code = 2


class HardwareError(QloraError, RuntimeError):
    """A setting needs hardware that this machine does not have."""

    exit_code = 2


class OutOfMemoryError(QloraError, MemoryError):
    """The run does not fit in memory."""

    exit_code = 3


class TrainingError(QloraError, RuntimeError):
    """The run failed after it had started."""


class PushError(QloraError, ConnectionError):
    """The result of a run could not be pushed to the hub; it remains on the disk."""


class TerminatedError(QloraError, InterruptedError):
    """The process was asked to end, by SIGTERM, or by SIGHUP when its terminal was closed."""

    def __init__(self, number: signal.Signals, then: str = "starts over") -> None:
        super().__init__(f"terminated by {number.name}", hint=f"The same command {then}.")
        self.exit_code = 128 + number


class MergeError(QloraError, RuntimeError):
    """The merged model differs from the model that was to be merged."""


class ExportError(QloraError, RuntimeError):
    """A merged model could not be exported, or the export differs from it."""
