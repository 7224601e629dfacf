"""Read the rows of a data set one at a time, in bounded memory, each with its problem if it has one."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from qlora_cli.data.finding.file_types import suffixes_of
from qlora_cli.data.finding.sources import DatasetSource
from qlora_cli.data.reading.columnar import count_arrow, count_parquet, read_arrow, read_parquet
from qlora_cli.data.reading.hub_rows import read_hub
from qlora_cli.data.reading.hub_rows import resolve_hub as resolve_hub
from qlora_cli.data.reading.json_files import count_json, count_json_lines, read_json, read_json_lines
from qlora_cli.data.reading.raw import SELECT_ALL, Selection
from qlora_cli.data.reading.raw import RawRow as RawRow
from qlora_cli.data.reading.sampling import sample_indices
from qlora_cli.data.reading.tables import count_delimited, read_delimited
from qlora_cli.data.rows.groups import columns_to_read, required_columns
from qlora_cli.errors import DataError
from qlora_cli.settings.models import DataSettings


@dataclass(frozen=True)
class _FileReader:
    """The functions that read and count the rows of a file type; `count` avoids decoding values where possible."""

    read: Callable[[Path, Selection], Iterator[RawRow]]
    count: Callable[[Path], int]


READERS = {
    ".jsonl": _FileReader(read_json_lines, count_json_lines),
    ".ndjson": _FileReader(read_json_lines, count_json_lines),
    ".json": _FileReader(read_json, count_json),
    ".csv": _FileReader(read_delimited, count_delimited),
    ".tsv": _FileReader(read_delimited, count_delimited),
    ".parquet": _FileReader(read_parquet, count_parquet),
    ".arrow": _FileReader(read_arrow, count_arrow),
}


def selection_for(settings: DataSettings, name: str) -> Selection:
    """Return which columns of the data set `name` to read, and which of them must be readable."""
    return Selection(
        columns=partial(columns_to_read, settings=settings, name=name),
        required=partial(required_columns, settings=settings, name=name),
    )


def read_rows(
    source: DatasetSource, *, split: str, seed: int, streaming: bool = False, selection: Selection = SELECT_ALL
) -> Generator[RawRow]:
    """Yield the rows of `source`, or the sample that it asks for, in the order of its files.

    Local files are always read incrementally; `split` and `streaming` apply to hub data sets, and a split in the name
    takes precedence. Columns that are not selected may be None in every row.

    Raises:
        DatasetNotFoundError: the hub has no such data set or revision, or can't be reached.
        DataError: a file can't be read at all, or has fewer rows than requested. A bad row is yielded with its
            problem.
        MissingDependencyError: the package that decompresses a file is not installed.
    """
    if not source.is_local:
        yield from read_hub(source, split=split, seed=seed, streaming=streaming, selection=selection)
    elif source.num_rows is None:
        for path in source.files:
            yield from _reader_for(path).read(path, selection)
    else:
        yield from _sample(source, seed, selection)


def _sample(source: DatasetSource, seed: int, selection: Selection) -> Iterator[RawRow]:
    counts = [_reader_for(path).count(path) for path in source.files]
    indices = sample_indices(source, sum(counts), seed)
    num_remaining, first = len(indices), 0
    for path, count in zip(source.files, counts, strict=True):
        start, end = np.searchsorted(indices, [first, first + count])
        mask = np.zeros(count, dtype=np.bool_)
        mask[indices[start:end] - first] = True
        first += count
        if start < end:
            for row in _reader_for(path).read(path, selection._replace(rows=mask.tobytes())):
                num_remaining -= 1
                yield row
    if num_remaining:
        raise DataError(f"{source.name} was changed while it was read", hint="Run it again.")


def _reader_for(path: Path) -> _FileReader:
    suffixes = suffixes_of(path)
    assert suffixes is not None, "find_dataset lets no other file through"
    return READERS[suffixes[0]]
