"""Recognise the layout of a data set by the columns of its first rows. Imports nothing heavy."""

import itertools
from collections.abc import Collection, Iterator, Sequence

from qlora_cli.data.limits import check_columns
from qlora_cli.data.opening.skipped import SkippedRow, bad_row_error
from qlora_cli.data.reading.raw import RawRow
from qlora_cli.data.reading.wrapped_rows import column_object_error, nested_rows_error
from qlora_cli.data.rows.column_formats import RowLayout, recognise
from qlora_cli.data.rows.examples import RowError
from qlora_cli.data.rows.groups import with_group_column
from qlora_cli.data.rows.unused_columns import check_preferences
from qlora_cli.errors import DataError
from qlora_cli.settings.models import DataSettings
from qlora_cli.settings.objectives import DataFormat

SAMPLED_ROWS = 100  # whose columns decide the format


def open_rows(name: str, rows: Iterator[RawRow], settings: DataSettings) -> tuple[RowLayout, Iterator[RawRow]]:
    """Return the layout of rows, recognised by the columns of the first ones, and an iterator over all rows.

    Raises:
        DataError: no format fits, the group column is missing, or no row can be read.
    """
    first = list(itertools.islice(rows, SAMPLED_ROWS))
    columns = list(dict.fromkeys(column for row in first for column in row.value or row.columns))
    check_columns(columns, name)
    if not first:
        raise DataError(f"{name} has no rows", hint="Give a data set with at least one row.")
    if not columns:
        bad = next((row for row in first if row.problem), first[0])
        raise bad_row_error(SkippedRow.from_row(bad, RowError(bad.problem or "it has no columns")))
    layout = with_group_column(_recognise(columns, first, settings, name), columns, settings.eval_group, name)
    return layout, itertools.chain(first, rows)


def _recognise(columns: Collection[str], first: Sequence[RawRow], settings: DataSettings, name: str) -> RowLayout:
    is_alone = len(first) == 1
    if is_alone and (column_error := column_object_error(first[0])) is not None:
        raise column_error
    try:
        return recognise(columns, settings, name)
    except DataError as error:
        # Where it is chosen, what rows lack of it is what is to be said.
        if settings.format not in (DataFormat.PREFERENCE, DataFormat.UNPAIRED_PREFERENCE):
            check_preferences([row.value for row in first if row.value is not None], settings, name)
        raise (nested_rows_error(first[0]) if is_alone else None) or error from error
