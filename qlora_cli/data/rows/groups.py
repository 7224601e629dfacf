"""Group rows that share a key, such as a user or a document, so that a group is held out as a whole."""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from qlora_cli.data.limits import join_names
from qlora_cli.data.rows.column_formats import RowLayout, columns_in_use, part_columns
from qlora_cli.data.rows.digests import digest_name
from qlora_cli.data.rows.examples import RowError, json_type_of
from qlora_cli.errors import DataError
from qlora_cli.settings.models import DataSettings

NO_GROUP = 0


def columns_to_read(columns: Collection[str], settings: DataSettings, name: str) -> Collection[str]:
    """Return which of a file's `columns` to read: those in use, and the group column."""
    used = columns_in_use(columns, settings, name)
    return used if settings.eval_group is None else {*used, settings.eval_group}


def required_columns(columns: Collection[str], settings: DataSettings, name: str) -> Collection[str]:
    """Return which of a file's `columns` must be readable in every row: those of the format, and the group column."""
    parts = part_columns(columns, settings, name)
    return parts if settings.eval_group is None else {*parts, settings.eval_group}


def with_group_column(layout: RowLayout, columns: Collection[str], group: str | None, name: str) -> RowLayout:
    """Return `layout` with the column `group` counted as used.

    Raises:
        DataError: the data set `name` has no such column.
    """
    if group is None:
        return layout
    if group not in columns:
        near = get_close_matches(group, columns, n=1)
        raise DataError(
            f"{name} has no column {group!r} to hold out rows by",
            hint=f"Did you mean {near[0]}?" if near else f"Its columns are {join_names(columns)}.",
            setting="data.eval_group",
        )
    return replace(layout, unused=tuple(column for column in layout.unused if column != group))


def digest_group(row: Mapping[str, Any], column: str | None) -> int:
    """Return a digest of a row's group; `NO_GROUP` if its value is missing or empty.

    A number equals the same number as text (as in CSV files), and as a float (as in columns with nulls).

    Raises:
        RowError: the column does not hold a single value.
    """
    value = row.get(column) if column is not None else None
    if isinstance(value, Mapping | list | tuple):
        raise RowError(f"{column!r} must be a single value to hold out rows by, found {json_type_of(value)}")
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return NO_GROUP
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return digest_name(str(value))
