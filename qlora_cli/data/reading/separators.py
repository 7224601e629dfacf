"""Detect the separator of CSV and TSV files: the one that the suffix implies, unless the first rows contradict it.

Spreadsheets write semicolons into .csv files in locales with decimal commas, and databases write tabs or bars.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from qlora_cli.data.finding.file_types import suffixes_of
from qlora_cli.data.limits import MAX_ROW_BYTES
from qlora_cli.data.reading.raw import open_text

SEPARATOR_NAMES: Mapping[str, str] = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars (|)"}
SAMPLE_BYTES, SAMPLED_RECORDS = 256 * 1024, 50
MAX_NAME_CHARACTERS = 60  # of a column's name, for another separator to be accepted
DECLARED = re.compile(r'"?sep=([^\w\s"]|\t)"?[ \t,;|]*\r?\n?', re.IGNORECASE)
Header = Sequence[str]


class Separator(NamedTuple):
    """The character between two fields, and whether spaces after it are skipped.

    `is_declared`: the first line declares it (`sep=;`), as Excel writes it, and is not part of the table.
    """

    character: str
    has_space: bool = False
    is_declared: bool = False

    def describe(self) -> str:
        """Return the separator in words: `semicolons`, `commas and spaces`."""
        return SEPARATOR_NAMES.get(self.character, repr(self.character)) + (" and spaces" if self.has_space else "")


class _Sample(NamedTuple):
    """The first records of a file, parsed with a separator: the header, and how many records have as many fields."""

    header: Header
    num_equal: int
    num_others: int

    @property
    def is_table(self) -> bool:
        """Whether the header has several distinct short names; the last may be empty, after a trailing separator."""
        names = [name.strip() for name in self.header]
        if len(names) < 2:
            return False
        are_names = (
            all(0 < len(name) <= MAX_NAME_CHARACTERS for name in names[:-1]) and len(names[-1]) <= MAX_NAME_CHARACTERS
        )
        return len(set(names)) == len(names) and are_names

    @property
    def has_spaces(self) -> bool:
        """Whether every name but the first begins with a space."""
        return len(self.header) > 1 and all(name.startswith(" ") for name in self.header[1:])


def default_separator(path: Path) -> str:
    """Return the separator that the suffix of a file implies."""
    return "\t" if (suffixes_of(path) or ("",))[0] == ".tsv" else ","


def detect_separator(path: Path) -> Separator:
    """Return the separator of a file: the default of its suffix, unless the first rows fit only another one.

    Raises:
        DataError: it can't be read.
    """
    lines, is_whole = _first_lines(path)
    if lines and (declared := DECLARED.fullmatch(lines[0])):
        return Separator(declared[1], is_declared=True)
    default = Separator(default_separator(path))
    by_default = _sample(lines, default, is_whole=is_whole)
    if len(by_default.header) > 1 and by_default.num_others == 0 and not by_default.has_spaces:
        return default
    candidates = [
        separator
        for character in SEPARATOR_NAMES
        if (separator := _separator_of_table(lines, character, by_default, is_whole=is_whole))
    ]
    return candidates[0] if len(candidates) == 1 else default


def separator_note(path: Path) -> str:
    """Return ` separated by …` for a message about fields; an empty string for the default separator."""
    separator = detect_separator(path)
    return "" if separator == Separator(default_separator(path)) else f" separated by {separator.describe()}"


def csv_reader(lines: Iterable[str], separator: Separator) -> Iterator[list[str]]:
    """Return a strict reader of the records in `lines`."""
    # After an unclosed quote, the rest of the file would be one field. Process-wide; the default is 128 Ki.
    csv.field_size_limit(MAX_ROW_BYTES)
    # Strict, because otherwise an unclosed quote silently takes the following rows into its field.
    return csv.reader(lines, delimiter=separator.character, skipinitialspace=separator.has_space, strict=True)


def _separator_of_table(
    lines: Sequence[str], character: str, by_default: _Sample, *, is_whole: bool
) -> Separator | None:
    """Return `character` as a separator, with or without spaces, if the lines are a table by it but not by default."""
    for separator in (Separator(character), Separator(character, has_space=True)):
        sample = _sample(lines, separator, is_whole=is_whole)
        # Some rows may be bad if the default separator does not even split the header.
        fits = sample.num_others == 0 or (len(by_default.header) < 2 and sample.num_equal > 0)
        if sample.is_table and fits and not sample.has_spaces:
            return separator
    return None


def _first_lines(path: Path) -> tuple[list[str], bool]:
    """Return the first lines of a file, and whether they are the whole file."""
    with open_text(path) as file:
        content = file.read(SAMPLE_BYTES)
        is_whole = not file.read(1)
    return list(StringIO(content.decode("utf-8", "surrogateescape"), newline="")), is_whole


def _sample(lines: Sequence[str], separator: Separator, *, is_whole: bool) -> _Sample:
    reader = csv_reader(lines, separator)
    sizes: list[int] = []
    header: list[str] | None = None
    while len(sizes) <= SAMPLED_RECORDS:
        try:
            record = next(reader)
        except StopIteration:
            sizes = sizes if is_whole else sizes[:-1]  # the last one may be truncated
            break
        except csv.Error:
            record = []
            sizes.append(0)
        else:
            sizes += [len(record)] if record else []
        header = header if header is not None else record
    header = header or []
    num_equal = sum(size == len(header) for size in sizes[1:])
    return _Sample(header, num_equal, max(0, len(sizes) - 1 - num_equal))
