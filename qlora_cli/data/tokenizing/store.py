"""The tokens of one data set on disk, memory-mapped, under a name that depends on all they come from.

The name is a digest of the bytes of the files (or the commit on the hub), chat template, tokenizer, settings, versions
and our own code. So stale tokens are impossible, and a second run over the same data starts at once.
"""

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from qlora_cli.cache import cache_folder, is_name
from qlora_cli.data.limits import MAX_BAD_ROWS_LISTED
from qlora_cli.data.opening.skipped import SkippedRow
from qlora_cli.data.reading.arrow_messages import check_messages
from qlora_cli.data.reading.readers import RawRow
from qlora_cli.data.rows.examples import RowError
from qlora_cli.errors import DataError, QloraError
from qlora_cli.writing import (
    PRIVATE_FILE,
    PRIVATE_FOLDER,
    clear_left_overs,
    discard,
    is_own,
    not_in_place,
    private_file,
    private_folder,
    write_directory,
    write_file,
)

TOKENS, ABOUT, SKIPPED = "tokens.arrow", "about.json", "skipped_rows.jsonl"
FILES = {TOKENS, ABOUT, SKIPPED}
SUM = "sha256"  # of the tokens, in what is told about them
MOST_TABLES = 24
KEPT_SECONDS = 24 * 60 * 60  # whatever their number: a run that goes on may be using them
IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("input_ids", IDS),
        ("labels", IDS),
        ("length", pa.int64()),
        ("supervised", pa.int64()),
        ("lost", pa.int64()),
        ("digest", pa.int64()),
        ("kept_digest", pa.int64()),
        ("group", pa.int64()),
        ("text_digest", pa.int64()),
        ("file", pa.int64()),
        ("number", pa.int64()),
    ]
)


class Record(NamedTuple):
    """One row of a table.

    Attributes:
        input_ids: int32 `(seq,)`, at most `max_length`.
        labels: int32 `(seq,)`; -100 is not trained.
        length: Tokens of the whole row.
        supervised: Tokens of `input_ids` that are trained.
        lost: Tokens of the whole row that would be trained, but lie beyond `max_length`.
        digest: That of the whole row's tokens and labels; equal rows have equal ones.
        kept_digest: The same over what is kept of it.
        group: A digest of the group that it is held out with; 0 if it has none.
        text_digest: That of the row's text, equal for texts that differ in case, punctuation and spaces alone; of
            a row that came as tokens, that of its tokens.
        file: Place of the row's file in `About.files`.
        number: Number of the row in its file, from 1.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    length: int
    supervised: int
    lost: int
    digest: int
    kept_digest: int
    group: int
    text_digest: int
    file: int
    number: int


@dataclass(frozen=True, kw_only=True)
class About:
    """What was recognised, and what is worth saying.

    Attributes:
        name: The data set, as the user named it.
        format: The format that was recognised.
        recognised: The same, with the columns that are not called as ours.
        files: The files that rows come from.
        num_rows: Rows of tokens.
        num_bad: Rows that could not be used; `skipped_rows.jsonl` lists the first ones.
        num_empty: Of them, those that only lack an answer.
        notes: What a user should know, such as a turn that ends with an unusual token.
    """

    name: str
    format: str
    recognised: str
    files: tuple[str, ...]
    num_rows: int
    num_bad: int
    num_empty: int
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class StoredTokens:
    """Rows of tokens on disk. `skipped` lists the rows that could not be used, if there are any."""

    dataset: Dataset
    about: About
    skipped: Path | None


class Writer:
    """Writes rows in batches, as they come, and notes down those that can't be used."""

    def __init__(self, folder: Path) -> None:
        self._file = pa.OSFile(str(private_file(folder / TOKENS)), "wb")
        self._arrow = pa.ipc.new_stream(self._file, SCHEMA)
        self._skipped = private_file(folder / SKIPPED).open("w", encoding="utf-8")
        self.num_rows = 0
        self.num_bad = 0
        self.num_empty = 0

    def write(self, records: Sequence[Record]) -> None:
        """Append rows."""
        self.num_rows += len(records)
        if records:
            self._arrow.write_batch(_as_batch(records))

    def skip(self, row: RawRow, problem: RowError) -> None:
        """Note down a row that can't be used, and why; of very many, the first ones are listed."""
        self.num_bad += 1
        self.num_empty += problem.is_empty
        if self.num_bad <= MAX_BAD_ROWS_LISTED:
            self._skipped.write(json.dumps(asdict(SkippedRow.from_row(row, problem))) + "\n")

    def close(self) -> None:
        """Complete the files."""
        self._arrow.close()
        self._file.close()
        self._skipped.close()


def recall(key: str) -> StoredTokens | None:
    """Return what is kept under `key`; None if there is nothing, or not what this user wrote, to the last bit."""
    folder = cache_folder("data") / key
    try:
        if not _is_own_table(folder):
            return None
        content = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if content.pop(SUM) != _sum_of(folder / TOKENS):
            return None
        about = About(**{**content, "files": tuple(content["files"]), "notes": tuple(content["notes"])})
        _validate(folder / TOKENS)
        dataset = Dataset.from_file(str(folder / TOKENS))
        folder.touch()  # the least recently used are deleted
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, pa.ArrowException, DataError):
        return None
    if len(dataset) != about.num_rows:  # cut short
        return None
    return StoredTokens(dataset=dataset, about=about, skipped=folder / SKIPPED if about.num_bad else None)


def _is_own_table(folder: Path) -> bool:
    """Whether a table lies here, no link leads to it, and it belongs to this user.

    Raises:
        OSError: it lacks a file.
    """
    return (
        _is_table(folder)
        and is_own(folder.lstat(), folder.parent)
        and all(not_in_place(folder / name) is None for name in (TOKENS, ABOUT, SKIPPED))
    )


def _sum_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _validate(file: Path) -> None:
    """Check every place that the rows name: pyarrow reads from where they say, inside of the file or not.

    Raises:
        ValueError: they are none of ours.
        ArrowException: one lies outside, or is none.
        DataError: a part expands to far more than it is.
    """
    with file.open("rb") as opened, pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
        if stream.schema != SCHEMA:
            raise ValueError(f"other columns: {stream.schema.names}")
        check_messages(opened, SCHEMA, range(len(SCHEMA)), file.name)
        for batch in stream:
            batch.validate(full=True)


def keep(key: str, fill: Callable[[Writer], About]) -> StoredTokens:
    """Let `fill` write what is kept under `key`, and open it; complete or absent, whatever happens.

    Raises:
        DataError: the directory can't be written to, or has something else in the place of a table.
    """
    folder = cache_folder("data") / key

    def write(place: Path) -> None:
        place.chmod(PRIVATE_FOLDER)
        writer = Writer(place)
        try:
            about = fill(writer)
        finally:
            writer.close()
        content = {**asdict(about), SUM: _sum_of(place / TOKENS)}
        write_file(place / ABOUT, json.dumps(content), mode=PRIVATE_FILE)

    check_writable()
    _check_replaceable(folder)
    _delete_old(folder)
    try:
        write_directory(folder, write)
    except OSError as error:
        if isinstance(error, QloraError):
            raise
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process has put the same there meanwhile
            raise DataError(
                f"tokens can't be kept in {folder.parent}: {error.strerror}",
                hint="Free room there, or set QLORA_CACHE to another directory.",
            ) from error
    stored = recall(key)
    assert stored is not None, "tokens that were just written"
    return stored


def check_writable() -> None:
    """Check that tokens can be kept, and make the directory for them.

    Raises:
        DataError: it can't be written to.
    """
    directory = cache_folder("data")
    hint = "Set QLORA_CACHE to another directory."
    try:
        private_folder(directory)
    except OSError as error:
        raise DataError(f"tokens can't be kept in {directory}: {error.strerror}", hint=hint) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise DataError(f"tokens can't be kept in {directory}: it can't be written to", hint=hint)


def _check_replaceable(folder: Path) -> None:
    names = _names_in(folder)
    is_table = names is not None and names <= FILES
    if os.path.lexists(folder) and not folder.is_symlink() and not is_table:
        raise DataError(
            f"tokens can't be kept in {folder}: it holds something else, or is another user's",
            hint="Move it away, or set QLORA_CACHE to another directory.",
        )


def _as_batch(records: Sequence[Record]) -> pa.RecordBatch:
    columns = [_lists([row.input_ids for row in records]), _lists([row.labels for row in records])]
    columns += [pa.array(values, pa.int64()) for values in list(zip(*records, strict=True))[2:]]
    return pa.record_batch(columns, schema=SCHEMA)


def _lists(rows: Sequence[NDArray[np.int32]]) -> pa.ListArray:
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows), pa.int32()))


def _delete_old(kept: Path) -> None:
    """Delete what was not used for a day, beyond a number, and what writers that were killed have left.

    The cache may be in a place that has other folders: only what is a table by its name and by what is in it goes.
    """
    clear_left_overs(kept.parent)
    tables = sorted((path for path in kept.parent.iterdir() if path != kept and _is_table(path)), key=_last_used)
    for path in tables[: max(0, len(tables) + 1 - MOST_TABLES)]:
        if _last_used(path) < time.time() - KEPT_SECONDS:
            with suppress(OSError):  # another process has just deleted it
                discard(path)


def _is_table(folder: Path) -> bool:
    names = _names_in(folder) if is_name(folder.name) and not folder.is_symlink() else None
    return names is not None and bool(names) and names <= FILES


def _names_in(folder: Path) -> set[str] | None:
    """Return what is in a folder; None if it is none, or another user's."""
    try:
        return {path.name for path in folder.iterdir()}
    except OSError:
        return None


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:  # another process has just deleted it
        return 0.0
