"""Rows that can't be used, and why: as list entries and as errors."""

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
    """A row that can't be used: its file, number and line, the problem, and a hint if there is one."""

    file: str
    row: int
    line: int | None
    problem: str
    hint: str | None = None

    @classmethod
    def from_row(cls, row: RawRow, problem: RowError) -> "SkippedRow":
        """Return the entry for `row` and the problem with it."""
        return cls(file=row.file, row=row.number, line=row.line, problem=str(problem), hint=problem.hint)

    def __str__(self) -> str:
        line = f" (line {self.line})" if self.line is not None else ""
        return f"{self.file}, row {self.row}{line}: {self.problem}"


def read_skipped_rows(lists: Iterable[Path], limit: int) -> list[SkippedRow]:
    """Return at most `limit` rows from files that list skipped rows as JSON lines."""
    skipped: list[SkippedRow] = []
    for path in lists:
        with path.open(encoding="utf-8") as lines:
            skipped += [SkippedRow(**json.loads(line)) for line in itertools.islice(lines, limit - len(skipped))]
    return skipped


def bad_row_error(row: SkippedRow) -> DataError:
    """Return the error for a row that can't be used."""
    hint = "Correct it, or use --on-bad-row skip to continue without such rows; they are listed then."
    return DataError(str(row), hint=row.hint or hint)
