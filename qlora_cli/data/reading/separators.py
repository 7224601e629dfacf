"""What separates the fields of a table that is written as text: as its suffix says, unless its first rows tell better.

Spreadsheets write semicolons into .csv files where a comma is part of numbers, and databases tabs or bars.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from qlora_cli.data.finding.file_types import suffixes_of
from qlora_cli.data.limits import LONGEST_ROW
from qlora_cli.data.reading.raw import open_text

NAMES: Mapping[str, str] = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars (|)"}
SAMPLE_BYTES, SAMPLED_RECORDS = 256 * 1024, 50
LONGEST_NAME = 60  # of a column, as far as another separator is believed
DECLARED = re.compile(r'"?sep=([^\w\s"]|\t)"?[ \t,;|]*\r?\n?', re.IGNORECASE)
Header = Sequence[str]


class Separator(NamedTuple):
    """What stands between two fields, and whether spaces behind it are no part of the field.

    `is_declared`: the first line says so, as Excel writes it (`sep=;`), and is none of the table.
    """

    character: str
    has_space: bool = False
    is_declared: bool = False

    def describe(self) -> str:
        """Return it in words: `semicolons`, `commas and spaces`."""
        return NAMES.get(self.character, repr(self.character)) + (" and spaces" if self.has_space else "")


class _Sample(NamedTuple):
    """The first records of a file as a separator cuts them: the header, and how many others have as many fields."""

    header: Header
    num_equal: int
    num_others: int

    @property
    def is_table(self) -> bool:
        """Whether the header names several columns, as names are; the last may be empty, behind a separator."""
        names = [name.strip() for name in self.header]
        if len(names) < 2:
            return False
        are_names = all(0 < len(name) <= LONGEST_NAME for name in names[:-1]) and len(names[-1]) <= LONGEST_NAME
        return len(set(names)) == len(names) and are_names

    @property
    def has_spaces(self) -> bool:
        """Whether every name but the first begins with a space."""
        return len(self.header) > 1 and all(name.startswith(" ") for name in self.header[1:])


def usual_separator(path: Path) -> str:
    """Return what the suffix of a file says."""
    return "\t" if (suffixes_of(path) or ("",))[0] == ".tsv" else ","


def separator_of(path: Path) -> Separator:
    """Return what separates the fields of a file: the usual, if its first rows do not all but say something else.

    Raises:
        DataError: it can't be read.
    """
    lines, is_whole = _first_lines(path)
    if lines and (declared := DECLARED.fullmatch(lines[0])):
        return Separator(declared[1], is_declared=True)
    usual = Separator(usual_separator(path))
    as_usual = _sample(lines, usual, is_whole=is_whole)
    if len(as_usual.header) > 1 and as_usual.num_others == 0 and not as_usual.has_spaces:
        return usual
    fitting = [found for character in NAMES if (found := _fitting(lines, character, as_usual, is_whole=is_whole))]
    return fitting[0] if len(fitting) == 1 else usual


def said_separator(path: Path) -> str:
    """Return ` separated by …` for a message about fields; nothing where the separator is the usual one."""
    separator = separator_of(path)
    return "" if separator == Separator(usual_separator(path)) else f" separated by {separator.describe()}"


def reader_of(lines: Iterable[str], separator: Separator) -> Iterator[list[str]]:
    """Return the records of `lines` as a strict reader yields them."""
    # Where a quote is left open, all that follows would be one field. Of the whole process; the default is 128 Ki.
    csv.field_size_limit(LONGEST_ROW)
    # Strict: otherwise a quote that is left open takes the rows that follow into its field, and nothing is said.
    return csv.reader(lines, delimiter=separator.character, skipinitialspace=separator.has_space, strict=True)


def _fitting(lines: Sequence[str], character: str, as_usual: _Sample, *, is_whole: bool) -> Separator | None:
    """Return `character` as a separator, with spaces or without, if it makes a table of what is none as usual."""
    for separator in (Separator(character), Separator(character, has_space=True)):
        found = _sample(lines, separator, is_whole=is_whole)
        # Rows may be wrong where the usual separator does not even cut the header.
        fits = found.num_others == 0 or (len(as_usual.header) < 2 and found.num_equal > 0)
        if found.is_table and fits and not found.has_spaces:
            return separator
    return None


def _first_lines(path: Path) -> tuple[list[str], bool]:
    """Return the first lines of a file, and whether they are all."""
    with open_text(path) as file:
        content = file.read(SAMPLE_BYTES)
        is_whole = not file.read(1)
    return list(StringIO(content.decode("utf-8", "surrogateescape"), newline="")), is_whole


def _sample(lines: Sequence[str], separator: Separator, *, is_whole: bool) -> _Sample:
    reader = reader_of(lines, separator)
    sizes: list[int] = []
    header: list[str] | None = None
    while len(sizes) <= SAMPLED_RECORDS:
        try:
            record = next(reader)
        except StopIteration:
            sizes = sizes if is_whole else sizes[:-1]  # the last one may be cut
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
