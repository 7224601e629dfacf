"""Read rows of Parquet and Arrow files, batch by batch, of the columns that are in use.

Such a file holds numbers that say where in it a text begins and ends. Nothing in pyarrow compares them with what is
there unless it is asked to; a damaged file would end the process, or show what else lies in memory as the text of a
row. So every batch is checked in full before a value of it is made.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from qlora_cli.data.arrow_messages import FILE_MARK, check_messages
from qlora_cli.data.kinds import printable
from qlora_cli.data.limits import DEEPEST, check_columns
from qlora_cli.data.parquet_groups import BATCH_ROWS, rows_at_once
from qlora_cli.data.raw import EVERYTHING, RawRow, Wanted, reading
from qlora_cli.errors import DataError

BATCH_BYTES = 4_000_000  # of columns that are made into values at once; one row may be more


class _Batches(NamedTuple):
    """Batches of the columns that are read, and the names of all columns."""

    names: list[str]
    batches: Iterator[Any]


def read_parquet(path: Path, wanted: Wanted = EVERYTHING) -> Iterator[RawRow]:
    """Yield the rows of a Parquet file; groups of rows of which none is wanted are not read.

    Raises:
        DataError: the file is damaged or can't be read.
    """
    with _open_parquet(path) as file:
        names = _checked_names(file.schema_arrow, path)
        columns = _columns_to_read(names, wanted)
        number, rows = 1, wanted.rows
        for group in range(file.num_row_groups):
            metadata = file.metadata.row_group(group)
            num_rows = metadata.num_rows
            if rows is None or any(rows[number - 1 : number - 1 + num_rows]):
                with path.open("rb") as pages:
                    batch_rows = rows_at_once(pages, metadata, columns, printable(path))
                batches = file.iter_batches(batch_size=batch_rows, row_groups=[group], columns=columns)
                yield from _rows_of(path, _Batches(names, map(_checked, batches)), number, wanted)
            number += num_rows


def count_parquet(path: Path) -> int:
    """Return the number of rows, from the footer."""
    with _open_parquet(path) as file:
        return int(file.metadata.num_rows)


@contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    from pyarrow import OSFile
    from pyarrow.parquet import ParquetFile

    # As bytes, because pyarrow takes only names that are UTF-8 as text.
    with _decoding(path), OSFile(os.fsencode(path)) as source, ParquetFile(source) as file:
        yield file


def read_arrow(path: Path, wanted: Wanted = EVERYTHING) -> Iterator[RawRow]:
    """Yield the rows of an Arrow file or stream.

    Raises:
        DataError: the file is damaged or can't be read.
    """
    with _decoding(path), _open_arrow(path, wanted) as (names, batches):
        parts = (
            batch.slice(start, BATCH_ROWS)
            for batch in map(_checked, batches)
            for start in range(0, batch.num_rows, BATCH_ROWS)
        )
        yield from _rows_of(path, _Batches(names, parts), 1, wanted)


def count_arrow(path: Path) -> int:
    """Return the number of rows, without reading their values."""
    with _decoding(path), _open_arrow(path, Wanted(columns=lambda _: ())) as (_, batches):
        return sum(batch.num_rows for batch in batches)


@contextmanager
def _open_arrow(path: Path, wanted: Wanted) -> Iterator[_Batches]:
    import pyarrow

    # Not mapped into memory: another process that cuts such a file short would end this one.
    with path.open("rb") as messages, pyarrow.OSFile(os.fsencode(path)) as file:
        is_file = messages.read(len(FILE_MARK)) == FILE_MARK
        opened = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
        schema = opened(file).schema
        names = _checked_names(schema, path)
        # No field at all would mean all of them.
        places = [names.index(name) for name in _columns_to_read(names, wanted)] or [0]
        check_messages(messages, schema, places, printable(path))
        file.seek(0)
        reader = opened(file, options=pyarrow.ipc.IpcReadOptions(included_fields=places))
        yield _Batches(names, map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader)


def _checked_names(schema: Any, path: Path) -> list[str]:
    """Return the names of the columns.

    Raises:
        DataError: there are too many, one is there twice, or one nests too deeply.
    """
    names = list(schema.names)
    check_columns(names, printable(path))
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{printable(path)} has the column {twice[0]!r} more than once", hint="Rename one of them.")
    for name, field in zip(names, schema, strict=True):
        if _depth_of(field.type) > DEEPEST:
            raise DataError(
                f"{printable(path)}: the column {name!r} nests deeper than {DEEPEST} levels", hint="Write it flatter."
            )
    return names


def _depth_of(kind: Any) -> int:
    """Return how deeply lists and objects nest in the values of a type."""
    depth, level = 0, [kind]
    while level := [each.field(index).type for each in level for index in range(each.num_fields)]:
        depth += 1
    return depth


def _columns_to_read(names: list[str], wanted: Wanted) -> list[str]:
    chosen: Collection[str] = names if wanted.columns is None else wanted.columns(names)
    return [name for name in names if name in chosen]


def _checked(batch: Any) -> Any:
    """Return `batch`, in which every place that it names was looked at.

    Raises:
        ArrowInvalid: one lies outside.
    """
    from pyarrow import ArrowInvalid

    try:
        batch.validate(full=True)
    except ArrowInvalid:
        # Text that is not UTF-8 is a fault of its row alone, which is told when its value is made.
        for column in batch.columns:
            column.view(_as_bytes(column.type)).validate(full=True)
    return batch


def _as_bytes(kind: Any) -> Any:
    """Return the type of the same values with bytes in the place of text."""
    import pyarrow
    from pyarrow import types

    for is_text, as_bytes in (
        (types.is_string, pyarrow.binary()),
        (types.is_large_string, pyarrow.large_binary()),
        (types.is_string_view, pyarrow.binary_view()),
    ):
        if is_text(kind):
            return as_bytes
    if types.is_dictionary(kind):
        return pyarrow.dictionary(kind.index_type, _as_bytes(kind.value_type), kind.ordered)
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    if types.is_map(kind):
        return pyarrow.map_(_as_bytes(kind.key_type), _as_bytes(kind.item_type))
    for is_list, make in (
        (types.is_list, pyarrow.list_),
        (types.is_large_list, pyarrow.large_list),
        (types.is_fixed_size_list, lambda value: pyarrow.list_(value, kind.list_size)),
    ):
        if is_list(kind):
            return make(kind.value_field.with_type(_as_bytes(kind.value_type)))
    return kind


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Explain what is wrong with a file of columns."""
    from pyarrow import ArrowException

    try:
        with reading(path):
            yield
    except (ArrowException, UnicodeDecodeError) as error:  # the latter for the name of a column
        with reading(path), path.open("rb") as file:
            head = file.read(8)
        found = str(error).partition("\n")[0].rstrip(".")
        raise DataError(
            f"{printable(path)} can't be read as {path.suffix}: {found}. It begins with {head!r}.",
            hint="Copy or download it again; or give it the suffix of what it is.",
        ) from error


def _rows_of(path: Path, read: _Batches, number: int, wanted: Wanted) -> Iterator[RawRow]:
    """Yield the rows of batches, which begin with row `number`, under the names of all columns."""
    file_name, unread = printable(path), dict.fromkeys(read.names)
    for batch in read.batches:
        places = [place for place in range(batch.num_rows) if wanted.has(number + place)]
        if places:
            chosen = batch if len(places) == batch.num_rows else batch.take(places)
            for place, (value, problem, num_bytes) in zip(places, _values_of(chosen), strict=True):
                row = None if value is None else {**unread, **value}
                yield RawRow(file_name, number + place, None, row, problem, num_bytes)
        number += batch.num_rows


class _Value(NamedTuple):
    """A row of columns, or what is wrong with it, and about how much it is."""

    value: Mapping[str, Any] | None
    problem: str | None
    num_bytes: int


def _values_of(batch: Any) -> Iterator[_Value]:
    """Yield the rows of `batch`, which is cut in two until a part is small enough and can be read as a whole."""
    num_bytes = _bytes_of(batch)
    if batch.num_rows == 1 or num_bytes <= BATCH_BYTES:
        try:
            rows = batch.to_pylist()
        except ValueError as error:  # one value has no counterpart in Python: text that is not UTF-8, for one
            if batch.num_rows == 1:
                yield _Value(None, f"a value can't be read: {error}", num_bytes)
                return
        else:
            yield from (_Value(plain_row(row), None, num_bytes // len(rows)) for row in rows)
            return
    middle = batch.num_rows // 2
    yield from _values_of(batch.slice(0, middle))
    yield from _values_of(batch.slice(middle))


def _bytes_of(batch: Any) -> int:
    return sum(_bytes_of_column(column) for column in batch.columns)


def _bytes_of_column(column: Any) -> int:
    from pyarrow import DictionaryArray

    if not isinstance(column, DictionaryArray):
        return int(column.nbytes)
    # A part of such a column has the whole dictionary, and every row becomes a value of its own.
    return int(column.indices.nbytes + column.dictionary.nbytes * len(column) // max(1, len(column.dictionary)))


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of columns without the nulls inside its values.

    In columns, every object has the keys of all others; a null is a key that was not there. That a column is
    null is kept.
    """
    return {column: _without_nulls(value) for column, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
