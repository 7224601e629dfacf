"""Limits on the size of rows and files: a damaged or hostile file causes an error, not an exhausted machine."""

from collections.abc import Collection, Iterable
from typing import Any

from qlora_cli.errors import DataError
from qlora_cli.units import MIB, counted, format_bytes

# Per line, field or list element: about sixteen million tokens, far beyond any model's context.
MAX_ROW_BYTES = 64 * MIB
# Per row: columns are looked up and reported one by one, by name.
MAX_COLUMNS = 1000
# Levels of lists and objects: tool schemas have about ten; functions that walk values recurse as deep.
MAX_NESTING = 100
# Text compresses to a fifth or a tenth, rarely to a fiftieth; a higher ratio points to a decompression bomb.
MAX_EXPANSION = 200
ALWAYS_ALLOWED_BYTES = 256 * MIB  # that an archive may expand to, however small it is
# Per text file: some tools write blank lines between rows, but a file of nothing else takes minutes to read.
MAX_BLANK_LINES, MAX_BLANK_LINES_PER_ROW = 1_000_000, 10
# Per columnar file: a row of text takes tens of bytes, but a tenth of a byte if all rows are alike.
MAX_ROWS_PER_BYTE, ALWAYS_ALLOWED_ROWS = 10, 100_000
MAX_VALUES_PER_BYTE, ALWAYS_ALLOWED_VALUES = 200, 2**24  # the padding of tokens takes almost nothing
MAX_BAD_ROWS_LISTED = 10_000

TOO_LONG = f"longer than {format_bytes(MAX_ROW_BYTES)}"
TOO_DEEP = f"nested too deeply to be read (more than {MAX_NESTING} lists and objects in each other)"
MAX_SHOWN_NAMES, MAX_SHOWN_CHARACTERS = 20, 60


class DecodingBudget:
    """The rows, values and bytes that a file may still be decoded into.

    They are limited by the size of the file, because nulls and repeated values take almost no space in its columns.
    """

    def __init__(self, name: str, num_bytes: int) -> None:
        self._name = name
        self._rows = max(ALWAYS_ALLOWED_ROWS, MAX_ROWS_PER_BYTE * num_bytes)
        self._values = max(ALWAYS_ALLOWED_VALUES, MAX_VALUES_PER_BYTE * num_bytes)
        self._bytes = max(ALWAYS_ALLOWED_BYTES, MAX_EXPANSION * num_bytes)

    def charge(self, *, num_rows: int = 0, num_values: int = 0, num_bytes: int = 0) -> None:
        """Subtract from the budget.

        Raises:
            DataError: the budget does not suffice.
        """
        self.check(num_rows=num_rows, num_values=num_values, num_bytes=num_bytes)
        self._rows -= num_rows
        self._values -= num_values
        self._bytes -= num_bytes

    def check(self, *, num_rows: int = 0, num_values: int = 0, num_bytes: int = 0) -> None:
        """Check that the budget suffices, without using it up.

        Raises:
            DataError: it does not.
        """
        if num_rows > self._rows:
            raise self._error(
                f"has more than {MAX_ROWS_PER_BYTE} rows for each of its bytes, and {ALWAYS_ALLOWED_ROWS:,}"
            )
        if num_values > self._values:
            raise self._error(
                f"has more than {MAX_VALUES_PER_BYTE} values for each of its bytes, and {ALWAYS_ALLOWED_VALUES:,}"
            )
        if num_bytes > self._bytes:
            raise self._error(
                f"expands to more than {MAX_EXPANSION} times its size, and {format_bytes(ALWAYS_ALLOWED_BYTES)}"
            )

    def _error(self, problem: str) -> DataError:
        return DataError(
            f"{self._name} {problem}",
            hint="If it is text to train on, rewrite the file as JSON lines.",
        )


def check_columns(columns: Collection[str], name: str) -> None:
    """Check the number of columns of the data set or file `name`.

    Raises:
        DataError: there are more than `MAX_COLUMNS`.
    """
    if len(columns) > MAX_COLUMNS:
        raise DataError(
            f"{name} has {counted(len(columns), 'column')}, more than {MAX_COLUMNS:,}",
            hint="Write a file with only the columns to train on.",
        )


def check_blank_lines(num_blank: int, num_rows: int, name: str) -> None:
    """Check the number of blank lines in the file `name` against the rows read so far.

    Raises:
        DataError: there are too many blank lines.
    """
    if num_blank > MAX_BLANK_LINES + MAX_BLANK_LINES_PER_ROW * num_rows:
        raise DataError(
            f"{name} has {num_blank:,} blank lines and {counted(num_rows, 'row')} so far: more blank lines than "
            f"{MAX_BLANK_LINES:,}, and {MAX_BLANK_LINES_PER_ROW} for each row",
            hint="If it is text to train on, remove them with: grep -v '^[[:space:]]*$'",
        )


def nests_too_deeply(value: Any) -> bool:
    """Return whether lists and objects in `value` nest deeper than `MAX_NESTING` levels."""
    level = _containers([value])
    for _ in range(MAX_NESTING):
        if not level:
            return False
        level = _containers(
            value
            for container in level
            for value in (container.values() if isinstance(container, dict) else container)
        )
    return bool(level)


def _containers(values: Iterable[Any]) -> list[dict[str, Any] | list[Any]]:
    return [value for value in values if isinstance(value, dict | list)]


def text_nests_too_deeply(value: Any, num_brackets: int) -> bool:
    """Return whether `value`, parsed from text with `num_brackets` opening brackets, nests too deeply."""
    return num_brackets > MAX_NESTING and nests_too_deeply(value)


def join_names(names: Collection[str]) -> str:
    """Return names for a message: the first of them, each truncated to fit on a line."""
    shown = [
        name if len(name) <= MAX_SHOWN_CHARACTERS else f"{name[:MAX_SHOWN_CHARACTERS]}…"
        for name, _ in zip(names, range(MAX_SHOWN_NAMES), strict=False)
    ]
    more = f", and {len(names) - MAX_SHOWN_NAMES:,} more" if len(names) > MAX_SHOWN_NAMES else ""
    return ", ".join(shown) + more
