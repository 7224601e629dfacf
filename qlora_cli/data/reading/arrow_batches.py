"""Batches of tables, of the columns in use alone, in which every place that they name was looked at.

A table holds numbers that say where in it a text begins and ends. Nothing in pyarrow compares them with what is there
unless it is asked to; a damaged one would end the process, or show what else lies in memory as the text of a row. So
every batch is checked in full before a value of it is made.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pyarrow
from pyarrow import types

from qlora_cli.data.limits import DEEPEST, Allowance, check_columns
from qlora_cli.data.reading.arrow_sizes import take_from
from qlora_cli.data.reading.arrow_values import BYTES_OF_TEXT
from qlora_cli.data.reading.parquet_groups import BATCH_ROWS
from qlora_cli.data.reading.raw import Wanted
from qlora_cli.errors import DataError

UNREAD = (pyarrow.lib.Type_INTERVAL_MONTHS, pyarrow.lib.Type_INTERVAL_DAY_TIME)  # of which pyarrow makes no array


def columns_to_read(schema: Any, wanted: Wanted, name: str) -> list[str]:
    """Return which columns of a table are in use, in its order; `name` is what it is called.

    Raises:
        DataError: there are too many columns; or one that is in use is there twice, nests too deeply, or has a type
            that is not read.
    """
    check_columns(schema.names, name)
    chosen: Collection[str] = schema.names if wanted.columns is None else wanted.columns(schema.names)
    fields = [field for field in schema if field.name in chosen]
    for column, count in Counter(field.name for field in fields).items():
        if count > 1:
            raise DataError(f"{name} has the column {column!r} more than once", hint="Rename one of them.")
    for field in fields:
        _check_type(field, name)
    return [field.name for field in fields]


def _check_type(field: Any, name: str) -> None:
    levels = list(_levels_of(field.type))
    if len(levels) - 1 > DEEPEST:
        raise DataError(
            f"{name}: the column {field.name!r} nests deeper than {DEEPEST} levels", hint="Write it flatter."
        )
    if unread := [kind for level in levels for kind in level if kind.id in UNREAD]:
        raise DataError(
            f"{name}: the column {field.name!r} has values of the type {unread[0]}, which is not read",
            hint="Write it anew as text.",
        )


def checked_batches(batch: Any, columns: Sequence[str], allowance: Allowance | None) -> Iterator[Any]:
    """Yield short parts of a record batch, of `columns` alone. `allowance` is that of the file, if it is of one.

    Raises:
        ArrowInvalid: a place in it lies outside.
        DataError: it is of more rows, values or bytes than the file may be.
    """
    chosen = batch.select(columns)
    try:
        chosen.validate(full=True)
    except pyarrow.ArrowInvalid:
        # Text that is not UTF-8, or a time beyond midnight, is a fault of its row alone, told when its value is made.
        for column in chosen.columns:
            column.view(_as_stored(column.type)).validate(full=True)
    if allowance is not None:
        take_from(allowance, chosen.columns, batch.num_rows)
    for start in range(0, batch.num_rows, BATCH_ROWS):
        yield chosen.slice(start, BATCH_ROWS)


def _levels_of(kind: Any) -> Iterator[list[Any]]:
    """Yield a type, the types of its parts, those of theirs, and so on."""
    level = [kind]
    while level:
        yield level
        level = [part for each in level for part in _parts_of(each)]


def _parts_of(kind: Any) -> list[Any]:
    if isinstance(kind, pyarrow.BaseExtensionType):
        return [kind.storage_type]
    if types.is_dictionary(kind):
        return [kind.value_type]
    return [kind.field(place).type for place in range(kind.num_fields)]


def _as_stored(kind: Any) -> Any:
    """Return the type of the same values as they are stored, of which only the places can be wrong."""
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _as_stored(kind.storage_type)
    if types.is_date64(kind) or types.is_time(kind):
        return pyarrow.int32() if kind.bit_width == 32 else pyarrow.int64()
    if types.is_decimal(kind):
        return pyarrow.binary(kind.byte_width)
    if types.is_dictionary(kind):
        return pyarrow.dictionary(kind.index_type, _as_stored(kind.value_type), kind.ordered)
    if types.is_run_end_encoded(kind):
        return pyarrow.run_end_encoded(kind.run_end_type, _as_stored(kind.value_type))
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_as_stored(field.type)) for field in kind])
    if types.is_map(kind):
        return pyarrow.map_(_as_stored(kind.key_type), _as_stored(kind.item_type))
    for is_list, make in (
        (types.is_list, pyarrow.list_),
        (types.is_large_list, pyarrow.large_list),
        (types.is_list_view, pyarrow.list_view),
        (types.is_large_list_view, pyarrow.large_list_view),
        # A size below 0 is found where the type itself is looked at.
        (
            types.is_fixed_size_list,
            lambda value: pyarrow.list_(value, kind.list_size) if kind.list_size >= 0 else kind,
        ),
    ):
        if is_list(kind):
            return make(kind.value_field.with_type(_as_stored(kind.value_type)))
    return BYTES_OF_TEXT.get(kind, kind)
