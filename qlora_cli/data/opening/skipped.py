"""Rows that can't be used: what is wrong with them, as it is listed and as an error."""

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qlora_cli.data.reading.raw import RawRow
from qlora_cli.data.rows.examples import RowError
from qlora_cli.errors import DataError


@dataclass(frozen=True, kw_only=True)
class SkippedRow:
    """A row that can't be used: its file, number and line, what is wrong with it, and what to do if that is known."""

    file: str
    row: int
    line: int | None
    problem: str
    hint: str | None = None

    @classmethod
    def of(cls, row: RawRow, problem: RowError) -> "SkippedRow":
        """Describe `row`."""
        return cls(file=row.file, row=row.number, line=row.line, problem=str(problem), hint=problem.hint)

    def __str__(self) -> str:
        line = f" (line {self.line})" if self.line is not None else ""
        return f"{self.file}, row {self.row}{line}: {self.problem}"


def read_skipped(lists: Iterable[Path], most: int) -> list[SkippedRow]:
    """Return the first rows of lists of skipped ones."""
    found: list[SkippedRow] = []
    for path in lists:
        with path.open(encoding="utf-8") as lines:
            found += [SkippedRow(**json.loads(line)) for line in itertools.islice(lines, most - len(found))]
    return found


def bad_row(row: SkippedRow) -> DataError:
    """Return the error that names a row that can't be used."""
    hint = "Correct it, or use --on-bad-row skip to go on without such rows; they are listed then."
    return DataError(str(row), hint=row.hint or hint)
