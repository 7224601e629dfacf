"""The first rows of a data set: by their columns its layout is recognised. Imports nothing heavy."""

import itertools
from collections.abc import Collection, Iterator, Sequence

from qlora_cli.data.limits import check_columns
from qlora_cli.data.opening.skipped import SkippedRow, bad_row
from qlora_cli.data.reading.raw import RawRow
from qlora_cli.data.reading.wrapped_rows import rows_by_column, rows_inside
from qlora_cli.data.rows.column_formats import RowLayout, recognise
from qlora_cli.data.rows.examples import RowError
from qlora_cli.data.rows.groups import with_groups
from qlora_cli.data.rows.refused_columns import check_preferences
from qlora_cli.errors import DataError
from qlora_cli.settings.models import DataSettings

SAMPLED_ROWS = 100  # rows whose columns are looked at to recognise the format


def open_rows(name: str, rows: Iterator[RawRow], settings: DataSettings) -> tuple[RowLayout, Iterator[RawRow]]:
    """Return the layout of rows by the columns of the first of them, and all of the rows.

    Raises:
        DataError: no format fits, there is no column of groups, or no row that can be read.
    """
    first = list(itertools.islice(rows, SAMPLED_ROWS))
    columns = list(dict.fromkeys(column for row in first for column in row.value or row.columns))
    check_columns(columns, name)
    if not first:
        raise DataError(f"{name} has no rows", hint="Give a data set with at least one row.")
    if not columns:
        bad = next((row for row in first if row.problem), first[0])
        raise bad_row(SkippedRow.of(bad, RowError(bad.problem or "it has no columns")))
    layout = with_groups(_recognised(columns, first, settings, name), columns, settings.eval_group, name)
    return layout, itertools.chain(first, rows)


def _recognised(columns: Collection[str], first: Sequence[RawRow], settings: DataSettings, name: str) -> RowLayout:
    is_alone = len(first) == 1
    if is_alone and (by_column := rows_by_column(first[0])) is not None:
        raise by_column
    try:
        return recognise(columns, settings, name)
    except DataError as error:
        check_preferences([row.value for row in first if row.value is not None], settings, name)
        raise (rows_inside(first[0]) if is_alone else None) or error from error
