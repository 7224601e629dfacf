"""Read rows of Parquet and Arrow files, batch by batch, of the columns that are in use."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from qlora_cli.bounded import DeadlyError, try_apart
from qlora_cli.data.finding.file_types import printable
from qlora_cli.data.limits import Allowance
from qlora_cli.data.reading.arrow_messages import FILE_MARK, check_messages
from qlora_cli.data.reading.parquet_groups import num_values, rows_at_once
from qlora_cli.data.reading.raw import EVERYTHING, RawRow, Wanted, reading
from qlora_cli.errors import DataError

DESCRIBED_SECONDS = 4.0
STDERR = 2


class BatchReader(NamedTuple):
    """Record batches of a table, the names of all its columns, and of those that are in use.

    `allowance` is what its file may be made into; None if it has no file, as a table of the hub.
    """

    names: Sequence[str]
    columns: Sequence[str]
    batches: Iterable[Any]
    allowance: Allowance | None = None


def read_parquet(path: Path, wanted: Wanted = EVERYTHING) -> Iterator[RawRow]:
    """Yield the rows of a Parquet file; groups of rows of which none is wanted are not read.

    Raises:
        DataError: the file is damaged or can't be read.
    """
    from qlora_cli.data.reading.arrow_batches import columns_to_read

    with _open_parquet(path) as file:
        _check_description(file.metadata, path)
        schema = file.schema_arrow
        columns = columns_to_read(schema, wanted, printable(path))
        allowance = _allowance_of(path)
        allowance.check(num_rows=file.metadata.num_rows)
        number, rows = 1, wanted.rows
        for group in range(file.num_row_groups):
            metadata = file.metadata.row_group(group)
            num_rows = metadata.num_rows
            if rows is None or any(rows[number - 1 : number - 1 + num_rows]):
                allowance.check(num_values=num_values(metadata, columns))
                with path.open("rb") as pages:
                    batch_rows = rows_at_once(pages, metadata, columns, printable(path))
                batches = file.iter_batches(batch_size=batch_rows, row_groups=[group], columns=columns)
                read = BatchReader(schema.names, columns, batches, allowance)
                yield from rows_of_batches(printable(path), read, number, wanted)
            number += num_rows


def count_parquet(path: Path) -> int:
    """Return the number of rows, from the footer."""
    with _open_parquet(path) as file:
        _allowance_of(path).check(num_rows=file.metadata.num_rows)
        return int(file.metadata.num_rows)


def _allowance_of(path: Path) -> Allowance:
    return Allowance(printable(path), path.stat().st_size)


@contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    from pyarrow import OSFile
    from pyarrow.parquet import ParquetFile

    # As bytes, because pyarrow takes only names that are UTF-8 as text.
    with _decoding(path), OSFile(os.fsencode(path)) as source, ParquetFile(source) as file:
        yield file


def _check_description(metadata: Any, path: Path) -> None:
    """Look at what a file says of its columns in a copy of this process, which pyarrow ends where it is no sense.

    Raises:
        DataError: it does.
    """

    def describe() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDERR)  # where pyarrow tells its end
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in range(group.num_columns):
                group.column(column)

    try:
        try_apart(describe, DESCRIBED_SECONDS, DESCRIBED_SECONDS)
    except DeadlyError as error:
        raise DataError(
            f"{printable(path)} is damaged: what it says of its columns contradicts itself",
            hint="Copy or download it again.",
        ) from error


def read_arrow(path: Path, wanted: Wanted = EVERYTHING) -> Iterator[RawRow]:
    """Yield the rows of an Arrow file or stream.

    Raises:
        DataError: the file is damaged or can't be read.
    """
    with _decoding(path), _open_arrow(path, wanted) as read:
        yield from rows_of_batches(printable(path), read, wanted=wanted)


def count_arrow(path: Path) -> int:
    """Return the number of rows, without reading their values."""
    with _decoding(path), _open_arrow(path, Wanted(columns=lambda _: ())) as read:
        num_rows = sum(int(batch.num_rows) for batch in read.batches)
    _allowance_of(path).check(num_rows=num_rows)
    return num_rows


@contextmanager
def _open_arrow(path: Path, wanted: Wanted) -> Iterator[BatchReader]:
    import pyarrow

    from qlora_cli.data.reading.arrow_batches import columns_to_read

    # Not mapped into memory: another process that cuts such a file short would end this one.
    with path.open("rb") as messages, pyarrow.OSFile(os.fsencode(path)) as file:
        is_file = messages.read(len(FILE_MARK)) == FILE_MARK
        opened = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
        schema = opened(file).schema
        columns = columns_to_read(schema, wanted, printable(path))
        # No field at all would mean all of them.
        places = [schema.names.index(name) for name in columns] or [0]
        check_messages(messages, schema, places, printable(path))
        file.seek(0)
        reader = opened(file, options=pyarrow.ipc.IpcReadOptions(included_fields=places))
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        yield BatchReader(schema.names, columns, batches, _allowance_of(path))


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


def rows_of_batches(name: str, read: BatchReader, number: int = 1, wanted: Wanted = EVERYTHING) -> Iterator[RawRow]:
    """Yield the rows of batches of the table `name`, which begin with row `number`, under the names of all columns.

    Raises:
        ArrowException: a batch is damaged.
    """
    from qlora_cli.data.reading.arrow_batches import checked_batches
    from qlora_cli.data.reading.arrow_values import rows_of

    unread = dict.fromkeys(read.names)
    for batch in (part for whole in read.batches for part in checked_batches(whole, read.columns, read.allowance)):
        places = [place for place in range(batch.num_rows) if wanted.has(number + place)]
        if places:
            found = (row for part in _taken(batch, places) for row in rows_of(part))
            for place, (value, problem, num_bytes) in zip(places, found, strict=True):
                row = None if value is None else {**unread, **value}
                yield RawRow(name, number + place, None, row, problem, num_bytes, read.names)
        number += batch.num_rows


def _taken(batch: Any, places: Sequence[int]) -> list[Any]:
    """Return the rows at `places`, which rise, as one batch, or in parts that follow one another if it has none."""
    from pyarrow import ArrowNotImplementedError, concat_batches

    runs = [list(run) for _, run in groupby(enumerate(places), lambda pair: pair[1] - pair[0])]
    parts = [batch.slice(run[0][1], len(run)) for run in runs]
    try:
        return [concat_batches(parts)]
    except ArrowNotImplementedError:  # for runs of JSON, for one; more types can be cut than joined, or taken from
        return parts
