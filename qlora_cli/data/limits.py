"""How much one row or file may be, so that a damaged or hostile one ends in a message, not in a machine at its end."""

from collections.abc import Collection, Iterable
from typing import Any

from qlora_cli.errors import DataError
from qlora_cli.units import MIB, format_bytes

# Of a line, a field, or a value in a list: some sixteen million tokens, far beyond what any model takes.
LONGEST_ROW = 64 * MIB
# Of a row: what is known of columns is asked and said by name, for each of them.
MOST_COLUMNS = 1000
# Lists and objects in each other: tool schemas have about ten; what walks through values calls itself as often.
DEEPEST = 100
# Text is compressed to a fifth or a tenth, rarely to a fiftieth; what gains more than this is made to fill a machine.
MOST_EXPANSION = 200
ALWAYS_EXPANDED = 256 * MIB  # bytes that an archive may have inside, however small it is
# Of a text: rows are written with some between them, and a file of nothing else is read for minutes.
MOST_BLANK_LINES, MOST_BLANK_FOR_EACH_ROW = 1_000_000, 10
# Of a file of columns, for each of its bytes: a row of text is tens of bytes, rarely a tenth of one if all are alike.
MOST_ROWS_PER_BYTE, ALWAYS_ROWS = 10, 100_000
MOST_VALUES_PER_BYTE, ALWAYS_VALUES = 200, 2**24  # the padding of tokens takes almost nothing
MOST_BAD_ROWS_LISTED = 10_000

TOO_LONG = f"longer than {format_bytes(LONGEST_ROW)}"
TOO_DEEP = f"nested too deeply to be read (more than {DEEPEST} lists and objects in each other)"
SHOWN_NAMES, SHOWN_CHARACTERS = 20, 60


class Allowance:
    """What the file `name` of `num_bytes` may be made into; in columns, nulls and equal values take no room."""

    def __init__(self, name: str, num_bytes: int) -> None:
        self._name = name
        self._rows = max(ALWAYS_ROWS, MOST_ROWS_PER_BYTE * num_bytes)
        self._values = max(ALWAYS_VALUES, MOST_VALUES_PER_BYTE * num_bytes)
        self._bytes = max(ALWAYS_EXPANDED, MOST_EXPANSION * num_bytes)

    def take(self, *, num_rows: int = 0, num_values: int = 0, num_bytes: int = 0) -> None:
        """Take from what is left.

        Raises:
            DataError: there is less left.
        """
        self.check(num_rows=num_rows, num_values=num_values, num_bytes=num_bytes)
        self._rows -= num_rows
        self._values -= num_values
        self._bytes -= num_bytes

    def check(self, *, num_rows: int = 0, num_values: int = 0, num_bytes: int = 0) -> None:
        """Check that as much is left.

        Raises:
            DataError: there is less left.
        """
        if num_rows > self._rows:
            raise self._error(f"has more than {MOST_ROWS_PER_BYTE} rows for each of its bytes, and {ALWAYS_ROWS:,}")
        if num_values > self._values:
            raise self._error(
                f"has more than {MOST_VALUES_PER_BYTE} values for each of its bytes, and {ALWAYS_VALUES:,}"
            )
        if num_bytes > self._bytes:
            raise self._error(
                f"expands to more than {MOST_EXPANSION} times its size, and {format_bytes(ALWAYS_EXPANDED)}"
            )

    def _error(self, what: str) -> DataError:
        return DataError(
            f"{self._name} {what}",
            hint="Is it text to train on? If it is, write the file anew as JSON lines.",
        )


def check_columns(columns: Collection[str], name: str) -> None:
    """Check that the data set or file `name` does not have too many columns.

    Raises:
        DataError: it has.
    """
    if len(columns) > MOST_COLUMNS:
        raise DataError(
            f"{name} has {len(columns):,} columns, more than {MOST_COLUMNS:,}",
            hint="Write a file with those alone that hold text to train on.",
        )


def check_blank_lines(num_blank: int, num_rows: int, name: str) -> None:
    """Check that there are not too many blank lines for the rows that were read of the file `name` so far.

    Raises:
        DataError: there are.
    """
    if num_blank > MOST_BLANK_LINES + MOST_BLANK_FOR_EACH_ROW * num_rows:
        raise DataError(
            f"{name} has {num_blank:,} blank lines and {num_rows:,} rows so far: more blank lines than "
            f"{MOST_BLANK_LINES:,}, and {MOST_BLANK_FOR_EACH_ROW} for each row",
            hint="Is it a text to train on? If it is, take them out with: grep -v '^[[:space:]]*$'",
        )


def nests_too_deeply(value: Any) -> bool:
    """Whether lists and objects in `value` nest deeper than `DEEPEST` levels."""
    level = _nested([value])
    for _ in range(DEEPEST):
        if not level:
            return False
        level = _nested(part for each in level for part in (each.values() if isinstance(each, dict) else each))
    return bool(level)


def _nested(values: Iterable[Any]) -> list[dict[str, Any] | list[Any]]:
    return [value for value in values if isinstance(value, dict | list)]


def text_nests_too_deeply(value: Any, num_brackets: int) -> bool:
    """Whether `value` nests too deeply, which was read of a text with `num_brackets` opening brackets."""
    return num_brackets > DEEPEST and nests_too_deeply(value)


def listed(names: Collection[str]) -> str:
    """Return names for a message, the first of many, each cut to what fits on a line."""
    shown = [
        name if len(name) <= SHOWN_CHARACTERS else f"{name[:SHOWN_CHARACTERS]}…"
        for name, _ in zip(names, range(SHOWN_NAMES), strict=False)
    ]
    more = f", and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(shown) + more
