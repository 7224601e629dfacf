"""Read rows of tables that are written as text, CSV and TSV."""

import csv
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO

from qlora_cli.data.finding.file_types import printable, suffixes_of
from qlora_cli.data.limits import LONGEST_ROW, TOO_LONG, check_blank_lines, check_columns
from qlora_cli.data.reading.raw import EVERYTHING, RawRow, Wanted, open_text
from qlora_cli.data.reading.separators import reader_of, said_separator, separator_of
from qlora_cli.errors import DataError
from qlora_cli.units import counted

# The first line of a record, and its fields or what is wrong with them.
Record = tuple[int, list[str], str | None]


def read_delimited(path: Path, wanted: Wanted = EVERYTHING) -> Iterator[RawRow]:
    """Yield the rows of a .csv or .tsv file under the names in its first line; every value is text.

    Raises:
        DataError: the file can't be read, or its header is none.
    """
    file_name = printable(path)
    with open_text(path) as file, closing(_records(path, file)) as records:
        header = _header(path, records)
        used = _columns_in_use(path, header, wanted)
        said = said_separator(path)
        for number, (line, fields, problem) in enumerate(records, start=1):
            if wanted.has(number):
                problem = problem or _size_problem(fields, header, said) or _problem_of(fields, header, used)
                value = None if problem else _value_of(fields, header, used)
                yield RawRow(file_name, number, line, value, problem, sum(map(len, fields)), header)


def count_delimited(path: Path) -> int:
    """Return the number of rows that `read_delimited` yields."""
    with open_text(path) as file, closing(_records(path, file)) as records:
        return max(0, sum(1 for _ in records) - 1)


def _records(path: Path, file: BinaryIO) -> Generator[Record]:
    """Yield what is not a blank line. What is not UTF-8 becomes half characters in its field, which names its row."""
    suffix, _ = suffixes_of(path) or ("", None)
    separator = separator_of(path)
    text = TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    lines = _Lines(text)
    if separator.is_declared:
        next(lines)
    reader = reader_of(lines, separator)
    num_blank = num_rows = 0
    try:
        while True:
            line = lines.number + 1
            try:
                fields = next(reader)
            except csv.Error as error:
                yield line, [], f"broken {suffix[1:].upper()}: {_explained(error)}"
                continue
            except _LongLineError:
                yield line, [], f"the line is {TOO_LONG}"
                continue
            if fields:
                num_rows += 1
                yield line, fields, None
            else:
                num_blank += 1
                check_blank_lines(num_blank, num_rows, printable(path))
    except StopIteration:
        return
    finally:
        text.detach()  # `file` is closed by those who opened it


def _explained(error: csv.Error) -> str:
    """Return what is wrong with a record, in words of what is there."""
    if "unexpected end of data" in str(error):
        return "a quote that begins a field of it is not closed to the end of the file"
    return f"{error}; a quote within a field is written twice" if "expected after" in str(error) else str(error)


class _LongLineError(Exception):
    """A line is longer than a row may be; the next one is read after it."""


class _Lines:
    """The lines of a text with their ends, and the number of the last one, from 1."""

    def __init__(self, text: TextIOWrapper) -> None:
        self.number = 0
        self._text = text

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._text.readline(LONGEST_ROW + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > LONGEST_ROW:
            while line and line[-1] not in "\r\n":
                line = self._text.readline(LONGEST_ROW)
            raise _LongLineError
        return line


def _header(path: Path, records: Iterator[Record]) -> Sequence[str]:
    _, header, problem = next(records, (1, [], "there is none"))
    check_columns(header, printable(path))
    if problem := problem or _problem_of(header, header, frozenset(header)):
        raise DataError(
            f"{printable(path)}: its first line names no columns: {problem}",
            hint="Save it as UTF-8 text, with a header.",
        )
    return header


def _columns_in_use(path: Path, header: Sequence[str], wanted: Wanted) -> Collection[str]:
    used = frozenset(header if wanted.columns is None else wanted.columns(header))
    if twice := sorted(name for name, count in Counter(header).items() if count > 1 and name in used):
        raise DataError(
            f"{printable(path)}: its header has the column {twice[0]!r} more than once", hint="Rename one of them."
        )
    return used


def _value_of(fields: Sequence[str], header: Sequence[str], used: Collection[str]) -> dict[str, str | None]:
    return {name: field if name in used else None for name, field in zip(header, fields, strict=True)}


def _size_problem(fields: Sequence[str], header: Sequence[str], said: str) -> str | None:
    same = len(fields) == len(header)
    return None if same else f"{counted(len(fields), 'field')}{said}, the header has {len(header)}"


def _problem_of(fields: Sequence[str], header: Sequence[str], used: Collection[str]) -> str | None:
    for name, field in zip(header, fields, strict=True):
        if name not in used:
            continue
        if "\0" in field:
            return f"NUL byte at {field.index(chr(0)) + 1} of {name!r}"
        try:
            field.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"not UTF-8 text (character {error.start + 1} of {name!r})"
    return None
