"""Read rows of tables: CSV and TSV as text, Parquet and Arrow batch by batch."""

import csv
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qlora_cli.data.raw import Kept, RawRow, is_kept, open_text, reading
from qlora_cli.data.sources import printable, suffixes_of
from qlora_cli.errors import DataError
from qlora_cli.units import counted

BATCH_ROWS = 1000
BATCH_BYTES = 4_000_000  # of columns that are made into values at once; one row may be more
LONGEST_FIELD = 2**28  # characters; where a quote is left open, all that follows would be one field
ARROW_FILE_MARK = b"ARROW1"  # what a stream does not begin with

# The first line of a record, and its fields or what is wrong with them.
Record = tuple[int, list[str], str | None]


def read_delimited(path: Path, kept: Kept = None) -> Iterator[RawRow]:
    """Yield the rows of a .csv or .tsv file under the names in its first line; every value is text.

    Raises:
        DataError: the file can't be read, or its header is none.
    """
    file_name = printable(path)
    with open_text(path) as file, closing(_records(path, file)) as records:
        header = _header(path, records)
        for number, (line, fields, problem) in enumerate(records, start=1):
            if is_kept(kept, number):
                problem = problem or _problem_of(fields, header)
                value = None if problem else dict(zip(header, fields, strict=True))
                yield RawRow(file_name, number, line, value, problem, sum(map(len, fields)))


def count_delimited(path: Path) -> int:
    """Return the number of rows that `read_delimited` yields."""
    with open_text(path) as file, closing(_records(path, file)) as records:
        return max(0, sum(1 for _ in records) - 1)


def _records(path: Path, file: BinaryIO) -> Generator[Record]:
    """Yield what is not a blank line. What is not UTF-8 becomes half characters in its field, which names its row."""
    suffix, _ = suffixes_of(path) or ("", None)
    csv.field_size_limit(LONGEST_FIELD)  # of the whole process; the default is 128 Ki
    text = TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    # Strict: otherwise a quote that is left open takes the rows that follow into its field, and nothing is said.
    reader = csv.reader(text, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
    try:
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except csv.Error as error:
                yield line, [], f"broken {suffix[1:].upper()}: {error}; is a quote left open?"
                continue
            if fields:
                yield line, fields, None
    except StopIteration:
        return
    finally:
        text.detach()  # `file` is closed by those who opened it


def _header(path: Path, records: Iterator[Record]) -> Sequence[str]:
    _, header, problem = next(records, (1, [], "there is none"))
    if problem := problem or _problem_of(header, header):
        raise DataError(
            f"{printable(path)}: its first line names no columns: {problem}",
            hint="Save it as UTF-8 text, with a header.",
        )
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(
            f"{printable(path)}: its header has the column {twice[0]!r} more than once", hint="Rename one of them."
        )
    return header


def _problem_of(fields: Sequence[str], header: Sequence[str]) -> str | None:
    if len(fields) != len(header):
        return f"{counted(len(fields), 'field')}, the header has {len(header)}"
    for name, field in zip(header, fields, strict=True):
        if "\0" in field:
            return f"NUL byte at {field.index(chr(0)) + 1} of {name!r}"
        try:
            field.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"not UTF-8 text (character {error.start + 1} of {name!r})"
    return None


def read_parquet(path: Path, kept: Kept = None) -> Iterator[RawRow]:
    """Yield the rows of a Parquet file; groups of rows of which none is kept are not read.

    Raises:
        DataError: the file is damaged or can't be read.
    """
    with _open_parquet(path) as file:
        number = 1
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if kept is None or any(kept[number - 1 : number - 1 + num_rows]):
                batches = file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group])
                yield from _rows_of(path, batches, number, kept)
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


def read_arrow(path: Path, kept: Kept = None) -> Iterator[RawRow]:
    """Yield the rows of an Arrow file or stream, mapped into memory.

    Raises:
        DataError: the file is damaged or can't be read.
    """
    with _decoding(path):
        parts = (
            batch.slice(start, BATCH_ROWS)
            for batch in _arrow_batches(path)
            for start in range(0, batch.num_rows, BATCH_ROWS)
        )
        yield from _rows_of(path, parts, 1, kept)


def count_arrow(path: Path) -> int:
    """Return the number of rows, without reading their values."""
    with _decoding(path):
        return sum(batch.num_rows for batch in _arrow_batches(path))


def _arrow_batches(path: Path) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(os.fsencode(path)) as file:
        is_file = file.read(len(ARROW_FILE_MARK)) == ARROW_FILE_MARK
        file.seek(0)
        if not is_file:
            yield from pyarrow.ipc.open_stream(file)
            return
        reader = pyarrow.ipc.open_file(file)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Explain what is wrong with a file of columns."""
    from pyarrow import ArrowException

    try:
        with reading(path):
            yield
    except ArrowException as error:
        with reading(path), path.open("rb") as file:
            head = file.read(8)
        found, _, _ = str(error).partition("\n")
        raise DataError(
            f"{printable(path)} can't be read as {path.suffix}: {found} It begins with {head!r}.",
            hint="Copy or download it again; or give it the suffix of what it is.",
        ) from error


def _rows_of(path: Path, batches: Iterator[Any], number: int, kept: Kept) -> Iterator[RawRow]:
    """Yield the rows of `batches`, which begin with row `number`, and of which those in `kept` are wanted."""
    file_name = printable(path)
    for batch in batches:
        places = [place for place in range(batch.num_rows) if is_kept(kept, number + place)]
        if places:
            chosen = batch if len(places) == batch.num_rows else batch.take(places)
            for place, (value, problem, num_bytes) in zip(places, _values_of(chosen), strict=True):
                yield RawRow(file_name, number + place, None, value, problem, num_bytes)
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
