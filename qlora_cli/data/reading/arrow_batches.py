"""Validated batches of the selected columns of a table.

A table holds the offsets at which each text begins and ends. pyarrow does not compare them with the size of the
buffers unless asked to; a wrong one would crash the process, or return other memory as the text of a row. So every
batch is validated in full before any value of it is decoded.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pyarrow
from pyarrow import types

from qlora_cli.data.limits import MAX_NESTING, DecodingBudget, check_columns
from qlora_cli.data.reading.arrow_sizes import charge_columns
from qlora_cli.data.reading.arrow_values import BINARY_TYPES
from qlora_cli.data.reading.parquet_groups import BATCH_ROWS
from qlora_cli.data.reading.raw import Selection
from qlora_cli.errors import DataError

UNSUPPORTED_TYPES = (
    pyarrow.lib.Type_INTERVAL_MONTHS,
    pyarrow.lib.Type_INTERVAL_DAY_TIME,
)  # for which pyarrow has no array class


def selected_columns(schema: Any, selection: Selection, name: str) -> list[str]:
    """Return the selected columns of a table, in its order; `name` is its name, for messages.

    Raises:
        DataError: there are too many columns; or a required one is duplicated, nests too deeply, or has an
            unsupported type. Other columns with such a problem are left out.
    """
    check_columns(schema.names, name)
    selected: Collection[str] = schema.names if selection.columns is None else selection.columns(schema.names)
    required = selected if selection.required is None else selection.required(schema.names)
    counts = Counter(field.name for field in schema)
    columns = []
    for field in schema:
        if field.name not in selected:
            continue
        problem = _problem_with(field, counts[field.name], name)
        if problem is not None and field.name in required:
            raise problem
        if problem is None:
            columns.append(field.name)
    return columns


def _problem_with(field: Any, count: int, name: str) -> DataError | None:
    if count > 1:
        return DataError(f"{name} has the column {field.name!r} more than once", hint="Rename one of them.")
    levels = list(_type_levels(field.type))
    if len(levels) - 1 > MAX_NESTING:
        return DataError(
            f"{name}: the column {field.name!r} nests deeper than {MAX_NESTING} levels", hint="Write it flatter."
        )
    if unsupported := [kind for level in levels for kind in level if kind.id in UNSUPPORTED_TYPES]:
        return DataError(
            f"{name}: the column {field.name!r} has values of the type {unsupported[0]}, which is not supported",
            hint="Rewrite it as text.",
        )
    return None


def validated_batches(batch: Any, columns: Sequence[str], budget: DecodingBudget | None) -> Iterator[Any]:
    """Yield slices of `columns` of a record batch, after validating it. `budget` is that of its file, if it has one.

    Raises:
        ArrowInvalid: an offset in it is out of range.
        DataError: it has more rows, values or bytes than the budget allows.
    """
    selected = batch.select(columns)
    try:
        selected.validate(full=True)
    except pyarrow.ArrowInvalid:
        # Text that is not UTF-8, or a time beyond midnight, makes only its row bad, which shows when it is decoded.
        for column in selected.columns:
            column.view(_storage_type(column.type)).validate(full=True)
    if budget is not None:
        charge_columns(budget, selected.columns, batch.num_rows)
    for start in range(0, batch.num_rows, BATCH_ROWS):
        yield selected.slice(start, BATCH_ROWS)


def _type_levels(kind: Any) -> Iterator[list[Any]]:
    """Yield the types at each level of nesting, beginning with `kind` itself."""
    level = [kind]
    while level:
        yield level
        level = [part for each in level for part in _child_types(each)]


def _child_types(kind: Any) -> list[Any]:
    if isinstance(kind, pyarrow.BaseExtensionType):
        return [kind.storage_type]
    if types.is_dictionary(kind):
        return [kind.value_type]
    return [kind.field(index).type for index in range(kind.num_fields)]


def _storage_type(kind: Any) -> Any:
    """Return the type that the values are stored as, of which only offsets can be invalid."""
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _storage_type(kind.storage_type)
    if types.is_date64(kind) or types.is_time(kind):
        return pyarrow.int32() if kind.bit_width == 32 else pyarrow.int64()
    if types.is_decimal(kind):
        return pyarrow.binary(kind.byte_width)
    if types.is_dictionary(kind):
        return pyarrow.dictionary(kind.index_type, _storage_type(kind.value_type), kind.ordered)
    if types.is_run_end_encoded(kind):
        return pyarrow.run_end_encoded(kind.run_end_type, _storage_type(kind.value_type))
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_storage_type(field.type)) for field in kind])
    if types.is_map(kind):
        return pyarrow.map_(_storage_type(kind.key_type), _storage_type(kind.item_type))
    for is_list, make in (
        (types.is_list, pyarrow.list_),
        (types.is_large_list, pyarrow.large_list),
        (types.is_list_view, pyarrow.list_view),
        (types.is_large_list_view, pyarrow.large_list_view),
        # A negative size is reported when the type itself is validated.
        (
            types.is_fixed_size_list,
            lambda value: pyarrow.list_(value, kind.list_size) if kind.list_size >= 0 else kind,
        ),
    ):
        if is_list(kind):
            return make(kind.value_field.with_type(_storage_type(kind.value_type)))
    return BINARY_TYPES.get(kind, kind)
