"""Read the rows of a data set one at a time, in bounded memory, and say of each what is wrong with it."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlora_cli.data.finding.file_types import suffixes_of
from qlora_cli.data.finding.sources import DatasetSource
from qlora_cli.data.reading.columnar import count_arrow, count_parquet, read_arrow, read_parquet
from qlora_cli.data.reading.hub_rows import read_hub
from qlora_cli.data.reading.hub_rows import resolve_hub as resolve_hub
from qlora_cli.data.reading.json_files import count_json, count_json_lines, read_json, read_json_lines
from qlora_cli.data.reading.raw import EVERYTHING, Wanted
from qlora_cli.data.reading.raw import RawRow as RawRow
from qlora_cli.data.reading.sampling import choose
from qlora_cli.data.reading.tables import count_delimited, read_delimited
from qlora_cli.errors import DataError


@dataclass(frozen=True)
class _RowReader:
    """How rows of one kind of file are read; `count` does so without making values of them where it can."""

    read: Callable[[Path, Wanted], Iterator[RawRow]]
    count: Callable[[Path], int]


READERS = {
    ".jsonl": _RowReader(read_json_lines, count_json_lines),
    ".ndjson": _RowReader(read_json_lines, count_json_lines),
    ".json": _RowReader(read_json, count_json),
    ".csv": _RowReader(read_delimited, count_delimited),
    ".tsv": _RowReader(read_delimited, count_delimited),
    ".parquet": _RowReader(read_parquet, count_parquet),
    ".arrow": _RowReader(read_arrow, count_arrow),
}


def read_rows(
    source: DatasetSource, *, split: str, seed: int, streaming: bool = False, wanted: Wanted = EVERYTHING
) -> Generator[RawRow]:
    """Yield the rows of `source`, or the sample of them that it asks for, in the order of its files.

    Files are always read bit by bit; `split` and `streaming` are for a hub data set, and a split in its name
    comes first. Of columns that are not `wanted`, a row may have the names alone, with None for their values.

    Raises:
        DatasetNotFoundError: the hub has no such data set or revision, or can't be reached.
        DataError: a file can't be read at all, or has fewer rows than asked for. One bad row is a row with a problem.
        MissingDependencyError: nothing here can decompress a file.
    """
    if not source.is_local:
        yield from read_hub(source, split=split, seed=seed, streaming=streaming, wanted=wanted)
    elif source.num_rows is None:
        for path in source.files:
            yield from _reader_of(path).read(path, wanted)
    else:
        yield from _sample(source, seed, wanted)


def _sample(source: DatasetSource, seed: int, wanted: Wanted) -> Iterator[RawRow]:
    counts = [_reader_of(path).count(path) for path in source.files]
    chosen = choose(source, sum(counts), seed)
    num_left, first = len(chosen), 0
    for path, count in zip(source.files, counts, strict=True):
        begin, end = np.searchsorted(chosen, [first, first + count])
        kept = np.zeros(count, dtype=np.bool_)
        kept[chosen[begin:end] - first] = True
        first += count
        if begin < end:
            for row in _reader_of(path).read(path, wanted._replace(rows=kept.tobytes())):
                num_left -= 1
                yield row
    if num_left:
        raise DataError(f"{source.name} was changed while it was read", hint="Run it again.")


def _reader_of(path: Path) -> _RowReader:
    suffixes = suffixes_of(path)
    assert suffixes is not None, "find_dataset lets no other file through"
    return READERS[suffixes[0]]
