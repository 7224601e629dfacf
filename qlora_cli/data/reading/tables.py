"""Read rows of CSV and TSV files."""

import csv
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO

from qlora_cli.data.finding.file_types import printable, suffixes_of
from qlora_cli.data.limits import MAX_ROW_BYTES, TOO_LONG, check_blank_lines, check_columns
from qlora_cli.data.reading.raw import SELECT_ALL, RawRow, Selection, open_text
from qlora_cli.data.reading.separators import csv_reader, detect_separator, separator_note
from qlora_cli.errors import DataError
from qlora_cli.units import counted

# The number of a record's first line, its fields, and the problem with them if there is one.
Record = tuple[int, list[str], str | None]


def read_delimited(path: Path, selection: Selection = SELECT_ALL) -> Iterator[RawRow]:
    """Yield the rows of a .csv or .tsv file, keyed by the names in its header; every value is text.

    Raises:
        DataError: the file can't be read, or its header is invalid.
    """
    file_name = printable(path)
    with open_text(path) as file, closing(_records(path, file)) as records:
        header = _header(path, records)
        columns = _selected_columns(path, header, selection)
        separated_by = separator_note(path)
        for number, (line, fields, problem) in enumerate(records, start=1):
            if selection.includes(number):
                problem = (
                    problem or _length_problem(fields, header, separated_by) or _text_problem(fields, header, columns)
                )
                value = None if problem else _row_value(fields, header, columns)
                yield RawRow(file_name, number, line, value, problem, sum(map(len, fields)), header)


def count_delimited(path: Path) -> int:
    """Return the number of rows that `read_delimited` yields."""
    with open_text(path) as file, closing(_records(path, file)) as records:
        return max(0, sum(1 for _ in records) - 1)


def _records(path: Path, file: BinaryIO) -> Generator[Record]:
    """Yield all records but blank lines. Invalid UTF-8 becomes surrogates, so that it is reported with its row."""
    suffix, _ = suffixes_of(path) or ("", None)
    separator = detect_separator(path)
    text = TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    lines = _Lines(text)
    if separator.is_declared:
        next(lines)
    reader = csv_reader(lines, separator)
    num_blank = num_rows = 0
    try:
        while True:
            line = lines.number + 1
            try:
                fields = next(reader)
            except csv.Error as error:
                yield line, [], f"broken {suffix[1:].upper()}: {_explain_csv_error(error)}"
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
        text.detach()  # the caller closes `file`


def _explain_csv_error(error: csv.Error) -> str:
    """Return the problem with a record in plain words."""
    if "unexpected end of data" in str(error):
        return "a quote that opens a field is not closed by the end of the file"
    return f"{error}; a quote within a field is written twice" if "expected after" in str(error) else str(error)


class _LongLineError(Exception):
    """A line is longer than a row may be; reading can continue with the next line."""


class _Lines:
    """Yields the lines of a text with their line ends; `number` is that of the last one, from 1."""

    def __init__(self, text: TextIOWrapper) -> None:
        self.number = 0
        self._text = text

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._text.readline(MAX_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > MAX_ROW_BYTES:
            while line and line[-1] not in "\r\n":
                line = self._text.readline(MAX_ROW_BYTES)
            raise _LongLineError
        return line


def _header(path: Path, records: Iterator[Record]) -> Sequence[str]:
    _, header, problem = next(records, (1, [], "there is none"))
    check_columns(header, printable(path))
    if problem := problem or _text_problem(header, header, frozenset(header)):
        raise DataError(
            f"{printable(path)}: its first line is not a header: {problem}",
            hint="Save it as UTF-8 text, with a header.",
        )
    return header


def _selected_columns(path: Path, header: Sequence[str], selection: Selection) -> Collection[str]:
    columns = frozenset(header if selection.columns is None else selection.columns(header))
    if duplicates := sorted(name for name, count in Counter(header).items() if count > 1 and name in columns):
        raise DataError(
            f"{printable(path)}: its header has the column {duplicates[0]!r} more than once",
            hint="Rename one of them.",
        )
    return columns


def _row_value(fields: Sequence[str], header: Sequence[str], columns: Collection[str]) -> dict[str, str | None]:
    return {name: field if name in columns else None for name, field in zip(header, fields, strict=True)}


def _length_problem(fields: Sequence[str], header: Sequence[str], separated_by: str) -> str | None:
    has_all = len(fields) == len(header)
    return None if has_all else f"{counted(len(fields), 'field')}{separated_by}, the header has {len(header)}"


def _text_problem(fields: Sequence[str], header: Sequence[str], columns: Collection[str]) -> str | None:
    for name, field in zip(header, fields, strict=True):
        if name not in columns:
            continue
        if "\0" in field:
            return f"NUL byte at {field.index(chr(0)) + 1} of {name!r}"
        try:
            field.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"not UTF-8 text (character {error.start + 1} of {name!r})"
    return None
