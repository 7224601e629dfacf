"""Rows that are inside of one object: where they are, and the command that writes them as a file of rows.

So are the answers of servers (`{"count": 2, "rows": […]}`), data sets with a version (`{"version": …, "data": […]}`),
and what pandas writes unless told otherwise (`{"question": {"0": …, "1": …}}`). Reading them by a guess could take the
messages of one conversation for rows.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qlora_cli.data.finding.file_types import suffixes_of
from qlora_cli.data.finding.split_names import TRAIN, words_in
from qlora_cli.data.limits import listed
from qlora_cli.data.reading.raw import RawRow
from qlora_cli.errors import DataError
from qlora_cli.units import counted

DEEPEST_LIST = 3  # objects around a list of rows
JSON_KINDS = (".json", ".jsonl", ".ndjson")
OBJECT = "d"  # what the file holds, in the command
OPENERS = {None: "open", ".gz": "gzip.open", ".bz2": "bz2.open", ".xz": "lzma.open"}


class _WrappedRows(NamedTuple):
    """What holds rows, in words, and the Python expression that makes a list of them."""

    where: str
    expression: str


def rows_by_column(row: RawRow) -> DataError | None:
    """Return the error of a file whose only row has the texts of all rows under each key; None if it has not."""
    return _error(row, list(_by_column(row.value))) if row.value else None


def rows_inside(row: RawRow) -> DataError | None:
    """Return the error of a file whose only row, of no known format, has lists of rows inside; None if it has none."""
    return _error(row, [*_by_number(row.value), *_lists(row.value)]) if row.value else None


def _error(row: RawRow, found: Sequence[_WrappedRows]) -> DataError | None:
    suffix, compression = suffixes_of(Path(row.file)) or ("", None)
    if not found or suffix not in JSON_KINDS:
        return None
    of_train = [rows for rows in found if words_in(rows.where) == {TRAIN}]
    return DataError(
        f"{row.file} is one object that holds the rows: {listed([rows.where for rows in found])}",
        hint=_command(row.file, compression, (of_train or found)[0].expression),
    )


def _command(file: str, compression: str | None, expression: str) -> str:
    if compression not in OPENERS:
        return f"Take the {compression} off it; then its rows can be written as a list."
    opener = OPENERS[compression]
    module = f", {opener.partition('.')[0]}" if compression else ""
    target = f"{Path(file).name.partition('.')[0]}-rows.json"
    code = (
        f'import json{module}; {OBJECT} = json.load({opener}({_literal(file)}, "rb")); '
        f'json.dump({expression}, open({_literal(target)}, "w"))'
    )
    return f"Write them as a list, and give {target}: python -c {shlex.quote(code)}"


def _literal(text: str) -> str:
    """Return a text as Python reads it, without the quotes that a shell has around the command."""
    return json.dumps(text, ensure_ascii=False)


def _lists(
    value: Mapping[str, Any], expression: str = OBJECT, path: str = "", depth: int = 0
) -> Iterator[_WrappedRows]:
    """Yield the lists of objects in an object, those further in last."""
    inside = {key: (f"{expression}[{_literal(key)}]", f"{path}.{key}".lstrip(".")) for key in value}
    for key, part in value.items():
        if isinstance(part, list) and part and all(isinstance(each, dict) for each in part):
            where, name = inside[key]
            yield _WrappedRows(f"{name} ({counted(len(part), 'object')} with {listed(list(part[0]))})", where)
    for key, part in value.items():
        if isinstance(part, dict) and depth < DEEPEST_LIST:
            yield from _lists(part, *inside[key], depth + 1)


def _by_column(value: Mapping[str, Any]) -> Iterator[_WrappedRows]:
    """Yield the rows of an object that holds a list or an index of texts under the name of each column."""
    parts = list(value.values())
    texts = f"each of {listed(list(value))} holds the values of all rows"
    if all(isinstance(part, list) and len(part) == len(parts[0]) and _are_texts(part) for part in parts):
        yield _WrappedRows(texts, f"[dict(zip({OBJECT}, row)) for row in zip(*{OBJECT}.values())]")
    elif all(isinstance(part, dict) and part.keys() == parts[0].keys() and _is_index(part) for part in parts):
        yield _WrappedRows(texts, f"[dict(zip({OBJECT}, row)) for row in zip(*map(dict.values, {OBJECT}.values()))]")


def _are_texts(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, str) for value in values)


def _is_index(value: Mapping[str, Any]) -> bool:
    return bool(value) and all(re.fullmatch(r"[0-9]+", key) for key in value)


def _by_number(value: Mapping[str, Any]) -> Iterator[_WrappedRows]:
    """Yield the rows of an object that holds one under each number."""
    if _is_index(value) and all(isinstance(part, dict) for part in value.values()):
        yield _WrappedRows(f"one under each of {listed(list(value))}", f"list({OBJECT}.values())")
