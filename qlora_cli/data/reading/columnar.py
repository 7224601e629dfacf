"""Read the selected columns of Parquet and Arrow files as rows, batch by batch."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from qlora_cli.bounded import UnsafeCodeError, try_in_fork
from qlora_cli.data.finding.file_types import printable
from qlora_cli.data.limits import DecodingBudget
from qlora_cli.data.reading.arrow_messages import FILE_MAGIC, check_messages
from qlora_cli.data.reading.parquet_groups import decodable_rows, num_values
from qlora_cli.data.reading.raw import SELECT_ALL, RawRow, Selection, explain_read_errors
from qlora_cli.errors import DataError

METADATA_SECONDS = 4.0
STDERR = 2


class TableBatches(NamedTuple):
    """Record batches of a table, with the names of all of its columns, and of the selected ones.

    `budget` is that of its file; None for a table without a file, as on the hub.
    """

    names: Sequence[str]
    columns: Sequence[str]
    batches: Iterable[Any]
    budget: DecodingBudget | None = None


def read_parquet(path: Path, selection: Selection = SELECT_ALL) -> Iterator[RawRow]:
    """Yield the selected rows of a Parquet file; row groups without a selected row are not read.

    Raises:
        DataError: the file is damaged or can't be read.
    """
    from qlora_cli.data.reading.arrow_batches import selected_columns

    with _open_parquet(path) as file:
        _check_column_metadata(file.metadata, path)
        schema = file.schema_arrow
        columns = selected_columns(schema, selection, printable(path))
        budget = _budget_of(path)
        budget.check(num_rows=file.metadata.num_rows)
        first_number, rows = 1, selection.rows
        for group in range(file.num_row_groups):
            metadata = file.metadata.row_group(group)
            num_rows = metadata.num_rows
            if rows is None or any(rows[first_number - 1 : first_number - 1 + num_rows]):
                budget.check(num_values=num_values(metadata, columns))
                with path.open("rb") as pages:
                    batch_rows = decodable_rows(pages, metadata, columns, printable(path))
                batches = file.iter_batches(batch_size=batch_rows, row_groups=[group], columns=columns)
                table = TableBatches(schema.names, columns, batches, budget)
                yield from rows_of_batches(printable(path), table, first_number, selection)
            first_number += num_rows


def count_parquet(path: Path) -> int:
    """Return the number of rows of a Parquet file, from its footer."""
    with _open_parquet(path) as file:
        _budget_of(path).check(num_rows=file.metadata.num_rows)
        return int(file.metadata.num_rows)


def _budget_of(path: Path) -> DecodingBudget:
    return DecodingBudget(printable(path), path.stat().st_size)


@contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    from pyarrow import OSFile
    from pyarrow.parquet import ParquetFile

    # As bytes, because pyarrow accepts only UTF-8 as text.
    with _explain_errors(path), OSFile(os.fsencode(path)) as source, ParquetFile(source) as file:
        yield file


def _check_column_metadata(metadata: Any, path: Path) -> None:
    """Read the metadata of all columns in a forked process, because pyarrow aborts if it contradicts itself.

    Raises:
        DataError: pyarrow aborted.
    """

    def describe() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDERR)  # where pyarrow prints why it aborts
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in range(group.num_columns):
                group.column(column)

    try:
        try_in_fork(describe, METADATA_SECONDS, METADATA_SECONDS)
    except UnsafeCodeError as error:
        raise DataError(
            f"{printable(path)} is damaged: the metadata of its columns contradicts itself",
            hint="Copy or download it again.",
        ) from error


def read_arrow(path: Path, selection: Selection = SELECT_ALL) -> Iterator[RawRow]:
    """Yield the rows of an Arrow file or stream.

    Raises:
        DataError: the file is damaged or can't be read.
    """
    with _explain_errors(path), _open_arrow(path, selection) as read:
        yield from rows_of_batches(printable(path), read, selection=selection)


def count_arrow(path: Path) -> int:
    """Return the number of rows of an Arrow file or stream, without decoding their values."""
    with _explain_errors(path), _open_arrow(path, Selection(columns=lambda _: ())) as read:
        num_rows = sum(int(batch.num_rows) for batch in read.batches)
    _budget_of(path).check(num_rows=num_rows)
    return num_rows


@contextmanager
def _open_arrow(path: Path, selection: Selection) -> Iterator[TableBatches]:
    import pyarrow

    from qlora_cli.data.reading.arrow_batches import selected_columns

    # Not memory-mapped: if another process truncates the file, this one would crash.
    with path.open("rb") as messages, pyarrow.OSFile(os.fsencode(path)) as file:
        is_file = messages.read(len(FILE_MAGIC)) == FILE_MAGIC
        open_table = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
        schema = open_table(file).schema
        columns = selected_columns(schema, selection, printable(path))
        # An empty list would select all fields.
        indices = [schema.names.index(name) for name in columns] or [0]
        check_messages(messages, schema, indices, printable(path))
        file.seek(0)
        reader = open_table(file, options=pyarrow.ipc.IpcReadOptions(included_fields=indices))
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        yield TableBatches(schema.names, columns, batches, _budget_of(path))


@contextmanager
def _explain_errors(path: Path) -> Iterator[None]:
    """Turn the errors of pyarrow about a file into a `DataError`."""
    from pyarrow import ArrowException

    try:
        with explain_read_errors(path):
            yield
    except (ArrowException, UnicodeDecodeError) as error:  # the latter for a column's name
        with explain_read_errors(path), path.open("rb") as file:
            head = file.read(8)
        reason = str(error).partition("\n")[0].rstrip(".")
        raise DataError(
            f"{printable(path)} can't be read as {path.suffix}: {reason}. It begins with {head!r}.",
            hint="Copy or download it again; or give it the suffix of its actual type.",
        ) from error


def rows_of_batches(
    name: str, table: TableBatches, first_number: int = 1, selection: Selection = SELECT_ALL
) -> Iterator[RawRow]:
    """Yield the rows of a table's batches, the first of which is row `first_number`, under the names of all columns.

    Raises:
        ArrowException: a batch is damaged.
    """
    from qlora_cli.data.reading.arrow_batches import validated_batches
    from qlora_cli.data.reading.arrow_values import rows_in_batch

    unread = dict.fromkeys(table.names)
    required = frozenset(table.names if selection.required is None else selection.required(table.names))
    for batch in (part for whole in table.batches for part in validated_batches(whole, table.columns, table.budget)):
        indices = [index for index in range(batch.num_rows) if selection.includes(first_number + index)]
        if indices:
            values = (row for part in _take_rows(batch, indices) for row in rows_in_batch(part, required))
            for index, (value, problem, num_bytes) in zip(indices, values, strict=True):
                row = None if value is None else {**unread, **value}
                yield RawRow(name, first_number + index, None, row, problem, num_bytes, table.names)
        first_number += batch.num_rows


def _take_rows(batch: Any, indices: Sequence[int]) -> list[Any]:
    """Return the rows at `indices`, which ascend, as one batch, or in consecutive slices if these can't be joined."""
    from pyarrow import ArrowNotImplementedError, concat_batches

    runs = [list(run) for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0])]
    parts = [batch.slice(run[0][1], len(run)) for run in runs]
    try:
        return [concat_batches(parts)]
    except (
        ArrowNotImplementedError
    ):  # more types can be sliced than joined, or taken from: run-end encoded JSON, for one
        return parts
