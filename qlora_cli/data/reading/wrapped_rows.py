"""Detect rows nested in a single object, and suggest the command that extracts them.

Examples are server responses (`{"count": 2, "rows": […]}`), versioned data sets (`{"version": …, "data": […]}`), and
the default output of pandas (`{"question": {"0": …, "1": …}}`). They are not read directly, because a wrong guess
could take the messages of one conversation for rows.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qlora_cli.data.finding.file_types import suffixes_of
from qlora_cli.data.finding.split_names import TRAIN, splits_in_name
from qlora_cli.data.limits import join_names
from qlora_cli.data.reading.raw import RawRow
from qlora_cli.data.rows.column_formats import PARTS
from qlora_cli.errors import DataError
from qlora_cli.settings.objectives import DataFormat
from qlora_cli.units import counted

MAX_LIST_DEPTH = 3  # of the objects around a list of rows
JSON_KINDS = (".json", ".jsonl", ".ndjson")
LINE_KINDS = (".jsonl", ".ndjson")
TURN_KEYS = frozenset({"role", "from", "parts", "speaker"})
CONVERSATIONS = frozenset(
    name for fmt in (DataFormat.MESSAGES, DataFormat.SHAREGPT) for names in PARTS[fmt].values() for name in names
)
COLUMN_NAMES = frozenset(name for parts in PARTS.values() for names in parts.values() for name in names)
OBJECT = "d"  # the variable for the file's content in the command
OPENERS = {None: "open", ".gz": "gzip.open", ".bz2": "bz2.open", ".xz": "lzma.open"}


class _WrappedRows(NamedTuple):
    """A description of where rows are nested, and the Python expression that extracts them as a list."""

    where: str
    expression: str


def column_object_error(row: RawRow) -> DataError | None:
    """Return the error for a file whose only row holds all rows' values under each key; None if it does not."""
    return _error(row, list(_column_objects(row.value, is_line=_is_line(row)))) if row.value else None


def nested_rows_error(row: RawRow) -> DataError | None:
    """Return the error for a file whose only row, of no known format, nests lists of rows; None if it does not."""
    if not row.value:
        return None
    wrapped = list(_indexed_rows(row.value))
    if not _has_text(row.value, is_line=_is_line(row)):
        wrapped += _nested_lists(row.value)
    return _error(row, wrapped)


def _is_line(row: RawRow) -> bool:
    """Return whether a row is a line of a file of rows, which is nearly always a row itself."""
    return (suffixes_of(Path(row.file)) or ("", None))[0] in LINE_KINDS


def _has_text(value: Mapping[str, Any], *, is_line: bool) -> bool:
    """Return whether there is text next to the lists, as in a row: under a known column, or any if it is a line."""
    return any(isinstance(part, str) and (is_line or key in COLUMN_NAMES) for key, part in value.items())


def _error(row: RawRow, wrapped: Sequence[_WrappedRows]) -> DataError | None:
    suffix, compression = suffixes_of(Path(row.file)) or ("", None)
    if not wrapped or suffix not in JSON_KINDS:
        return None
    train_rows = [rows for rows in wrapped if splits_in_name(rows.where) == {TRAIN}]
    return DataError(
        f"{row.file} is one object that holds the rows: {join_names([rows.where for rows in wrapped])}",
        hint=_command(row.file, compression, (train_rows or wrapped)[0].expression),
    )


def _command(file: str, compression: str | None, expression: str) -> str:
    if compression not in OPENERS:
        return "Decompress it; then its rows can be written as a list."
    opener = OPENERS[compression]
    module = f", {opener.partition('.')[0]}" if compression else ""
    target = f"{Path(file).name.partition('.')[0]}-rows.json"
    code = (
        f'import json{module}; {OBJECT} = json.load({opener}({_literal(file)}, "rb")); '
        f'json.dump({expression}, open({_literal(target)}, "w"))'
    )
    return f"Write them as a list, and give {target}: python -c {shlex.quote(code)}"


def _literal(text: str) -> str:
    """Return `text` as a Python literal without single quotes, which enclose the command in the shell."""
    return json.dumps(text, ensure_ascii=False)


def _nested_lists(
    value: Mapping[str, Any], expression: str = OBJECT, path: str = "", depth: int = 0
) -> Iterator[_WrappedRows]:
    """Yield the lists of objects nested in an object, the outer ones first."""
    nested = {key: (f"{expression}[{_literal(key)}]", f"{path}.{key}".lstrip(".")) for key in value}
    for key, part in value.items():
        if isinstance(part, list) and part and all(isinstance(each, dict) and not _is_turn(each) for each in part):
            where, name = nested[key]
            yield _WrappedRows(f"{name} ({counted(len(part), 'object')} with {join_names(list(part[0]))})", where)
    for key, part in value.items():
        if isinstance(part, dict) and depth < MAX_LIST_DEPTH:
            yield from _nested_lists(part, *nested[key], depth + 1)


def _is_turn(value: Mapping[str, Any]) -> bool:
    """Return whether an object is a turn of a conversation, judging by a key that names the speaker."""
    return not TURN_KEYS.isdisjoint(value)


def _column_objects(value: Mapping[str, Any], *, is_line: bool) -> Iterator[_WrappedRows]:
    """Yield the rows of an object that holds a list, or an indexed object, of values under each column's name."""
    parts = list(value.values())
    texts = f"each of {join_names(list(value))} holds the values of all rows"
    are_columns = not is_line and CONVERSATIONS.isdisjoint(value)
    if are_columns and all(
        isinstance(part, list) and len(part) == len(parts[0]) and _are_texts(part) for part in parts
    ):
        yield _WrappedRows(texts, f"[dict(zip({OBJECT}, row)) for row in zip(*{OBJECT}.values())]")
    elif all(isinstance(part, dict) and part.keys() == parts[0].keys() and _is_index(part) for part in parts):
        yield _WrappedRows(texts, f"[dict(zip({OBJECT}, row)) for row in zip(*map(dict.values, {OBJECT}.values()))]")


def _are_texts(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, str) for value in values)


def _is_index(value: Mapping[str, Any]) -> bool:
    return bool(value) and all(re.fullmatch(r"[0-9]+", key) for key in value)


def _indexed_rows(value: Mapping[str, Any]) -> Iterator[_WrappedRows]:
    """Yield the rows of an object that holds one row under each number."""
    if _is_index(value) and all(isinstance(part, dict) for part in value.values()):
        yield _WrappedRows(f"one under each of {join_names(list(value))}", f"list({OBJECT}.values())")
