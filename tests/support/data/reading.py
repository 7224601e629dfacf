"""Helpers for tests of readers: write small files, and read their rows."""

from pathlib import Path
from typing import Any

from qlora_cli.data.finding.sources import find_dataset
from qlora_cli.data.reading.readers import RawRow, read_rows


def read(name: str | Path, seed: int = 0) -> list[RawRow]:
    return list(read_rows(find_dataset(str(name)), split="train", seed=seed))


def values_of(name: str | Path) -> list[Any]:
    rows = read(name)
    assert [row.problem for row in rows] == [None] * len(rows)
    return [row.value for row in rows]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def problems_of(path: Path) -> list[tuple[int, int | None, str | None]]:
    """Return number, line and problem of each row, checking that exactly one of value and problem is set."""
    rows = read(path)
    assert all((row.value is None) != (row.problem is None) and row.file == str(path) for row in rows)
    return [(row.number, row.line, row.problem) for row in rows]
