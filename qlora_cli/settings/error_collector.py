"""Collect errors in the input, to report all of them together."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from qlora_cli.errors import Problem, QloraError, SettingsError
from qlora_cli.settings.display import flag_of

INPUT_IS_WRONG = SettingsError.exit_code


class ErrorCollector:
    """Collects errors in the input, each with the setting that causes it; `where_of` says where a setting was given.

    Only errors in the input are collected: that something does not fit in memory is reported after them.
    """

    def __init__(self, where_of: Callable[[str], str] = flag_of) -> None:
        self._where_of = where_of
        self._errors: list[tuple[str, QloraError]] = []

    def add(self, setting: str, error: QloraError) -> None:
        """Add an error, unless an equal one was added before."""
        if all((str(error), error.hint) != (str(other), other.hint) for _, other in self._errors):
            self._errors.append((setting, error))

    def extend(self, errors: Iterable[tuple[str, QloraError]]) -> None:
        """Add errors, each with its setting."""
        for setting, error in errors:
            self.add(setting, error)

    @contextmanager
    def collecting(self, setting: str) -> Iterator[None]:
        """Collect an error that is raised within, and continue after the block.

        Raises:
            QloraError: the error is not in the input; if others were collected before, these are raised instead.
        """
        try:
            yield
        except QloraError as error:
            if error.exit_code != INPUT_IS_WRONG:
                self.raise_collected()
                raise
            self.add(setting, error)

    @property
    def error(self) -> QloraError | None:
        """The single collected error, or a `SettingsError` with the problems of all; None if there is none."""
        if len(self._errors) < 2:
            return self._errors[0][1] if self._errors else None
        return SettingsError([problem for entry in self._errors for problem in self._problems(*entry)])

    def raise_collected(self) -> None:
        """Raise what was collected, if anything.

        Raises:
            QloraError: see `error`.
        """
        if (error := self.error) is not None:
            raise error

    def _problems(self, setting: str, error: QloraError) -> tuple[Problem, ...]:
        if isinstance(error, SettingsError):
            return error.problems
        return (Problem(where=self._where_of(error.setting or setting), message=error.message, hint=error.hint),)
