"""Errors that are found one after another, and reported together."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from qlora_cli.errors import Problem, QloraError, SettingsError
from qlora_cli.settings.display import flag_of

INPUT_IS_WRONG = SettingsError.exit_code


class ErrorCollector:
    """What is wrong with the input, each time with the setting that it is about; `where_of` says where one was given.

    Only what is wrong with the input is collected: that something does not fit in memory is reported after that.
    """

    def __init__(self, where_of: Callable[[str], str] = flag_of) -> None:
        self._where_of = where_of
        self._found: list[tuple[str, QloraError]] = []

    def add(self, setting: str, error: QloraError) -> None:
        """Keep an error, unless the same was found before."""
        if all((str(error), error.hint) != (str(other), other.hint) for _, other in self._found):
            self._found.append((setting, error))

    def extend(self, found: Iterable[tuple[str, QloraError]]) -> None:
        """Keep errors, each with its setting."""
        for setting, error in found:
            self.add(setting, error)

    @contextmanager
    def collecting(self, setting: str) -> Iterator[None]:
        """Keep an error of what is done within, and continue after it.

        Raises:
            QloraError: another than of the input; what was found before comes first.
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
        """What was found: the one error, or a `SettingsError` with the problems of all; None if nothing was."""
        if len(self._found) < 2:
            return self._found[0][1] if self._found else None
        return SettingsError([problem for found in self._found for problem in self._problems(*found)])

    def raise_collected(self) -> None:
        """Raise what was found, if anything was.

        Raises:
            QloraError: see `error`.
        """
        if (error := self.error) is not None:
            raise error

    def _problems(self, setting: str, error: QloraError) -> tuple[Problem, ...]:
        if isinstance(error, SettingsError):
            return error.problems
        return (Problem(where=self._where_of(error.setting or setting), message=error.message, hint=error.hint),)
