"""The cache of tokenized data sets on disk, memory-mapped, keyed by everything that tokens depend on.

The key is a digest of the bytes of the files (or the commit on the hub), chat template, tokenizer, settings, versions
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

from qlora_cli.cache import cache_folder, is_digest
from qlora_cli.data.limits import MAX_BAD_ROWS_LISTED
from qlora_cli.data.opening.skipped import SkippedRow
from qlora_cli.data.reading.arrow_messages import check_messages
from qlora_cli.data.reading.readers import RawRow
from qlora_cli.data.rows.examples import RowError
from qlora_cli.errors import DataError, QloraError
from qlora_cli.writing import (
    PRIVATE_FILE,
    PRIVATE_FOLDER,
    clear_leftovers,
    discard,
    is_owned_by_user,
    private_file,
    private_folder,
    unsafe_reason,
    write_directory,
    write_file,
)

TOKENS, ABOUT, SKIPPED = "tokens.arrow", "about.json", "skipped_rows.jsonl"
FILES = {TOKENS, ABOUT, SKIPPED}
CHECKSUM = "sha256"  # of the tokens, in `about.json`
MAX_TABLES = 24
MIN_UNUSED_SECONDS = 24 * 60 * 60  # before one may be deleted, because a run may be using it
UNLABELLED = -1
IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("input_ids", IDS),
        ("labels", IDS),
        ("first", pa.int64()),
        ("desirable", pa.int64()),
        ("length", pa.int64()),
        ("longest", pa.int64()),
        ("trained", pa.int64()),
        ("lost", pa.int64()),
        ("digest", pa.int64()),
        ("truncated_digest", pa.int64()),
        ("group", pa.int64()),
        ("text_digest", pa.int64()),
        ("file", pa.int64()),
        ("number", pa.int64()),
    ]
)


class TokenRow(NamedTuple):
    """One tokenized row.

    Attributes:
        input_ids: int32 `(seq,)`, each sequence truncated to `max_length`.
        labels: int32 `(seq,)`; -100 is ignored by the loss.
        first: The number of tokens of the first sequence, if the row is a pair of two; else 0.
        desirable: 1 if a label says that the answer is wanted, 0 if it says that it is not, `UNLABELLED` without one.
        length: The number of tokens before truncation.
        longest: The number of tokens of the longest sequence before truncation.
        trained: The number of trained tokens in `input_ids`.
        lost: The number of tokens to train that truncation removed.
        digest: A digest of tokens and labels before truncation, and of whether the answer is wanted, if that is known.
        truncated_digest: One of tokens and labels after truncation.
        group: A digest of the group that the row is held out with; 0 if it has none.
        text_digest: A digest of the row's text, equal for texts that differ only in case, punctuation and spaces;
            of a pretokenized row, a digest of its tokens.
        file: The index of the row's file in `TokenizedDataset.files`.
        number: The number of the row in its file, from 1.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    first: int
    desirable: int
    length: int
    longest: int
    trained: int
    lost: int
    digest: int
    truncated_digest: int
    group: int
    text_digest: int
    file: int
    number: int


@dataclass(frozen=True, kw_only=True)
class TokenizedDataset:
    """The description of a tokenized data set.

    Attributes:
        name: The name of the data set, as the user gave it.
        format: The format that was recognised.
        recognised: The same, with the columns whose names differ from ours.
        files: The files that rows come from.
        num_rows: Rows of tokens.
        num_bad: Rows that could not be used; `skipped_rows.jsonl` lists the first ones.
        num_empty: Rows among them that only lack an answer.
        notes: Notes for the user, such as on turns that end with an unusual token.
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
    """Tokenized rows on disk. `skipped` is the file that lists rows that could not be used, if there are any."""

    dataset: Dataset
    about: TokenizedDataset
    skipped: Path | None


class TokenWriter:
    """Writes tokenized rows in batches, and lists those that can't be used."""

    def __init__(self, folder: Path) -> None:
        self._file = pa.OSFile(str(private_file(folder / TOKENS)), "wb")
        self._arrow = pa.ipc.new_stream(self._file, SCHEMA)
        self._skipped = private_file(folder / SKIPPED).open("w", encoding="utf-8")
        self.num_rows = 0
        self.num_bad = 0
        self.num_empty = 0

    def write(self, records: Sequence[TokenRow]) -> None:
        """Append rows."""
        self.num_rows += len(records)
        if records:
            self._arrow.write_batch(_as_batch(records))

    def skip(self, row: RawRow, problem: RowError) -> None:
        """Count a row that can't be used, and list it with the reason, up to a maximum number."""
        self.num_bad += 1
        self.num_empty += problem.is_empty
        if self.num_bad <= MAX_BAD_ROWS_LISTED:
            self._skipped.write(json.dumps(asdict(SkippedRow.from_row(row, problem))) + "\n")

    def close(self) -> None:
        """Complete the files."""
        self._arrow.close()
        self._file.close()
        self._skipped.close()


def load(key: str) -> StoredTokens | None:
    """Return the tokens cached under `key`; None if there are none, or not exactly those that this user wrote."""
    folder = cache_folder("data") / key
    try:
        if not _is_own_token_folder(folder):
            return None
        content = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if content.pop(CHECKSUM) != _checksum_of(folder / TOKENS):
            return None
        about = TokenizedDataset(**{**content, "files": tuple(content["files"]), "notes": tuple(content["notes"])})
        _validate(folder / TOKENS)
        dataset = Dataset.from_file(str(folder / TOKENS))
        folder.touch()  # the least recently used ones are deleted
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, pa.ArrowException, DataError):
        return None
    if len(dataset) != about.num_rows:  # truncated
        return None
    return StoredTokens(dataset=dataset, about=about, skipped=folder / SKIPPED if about.num_bad else None)


def _is_own_token_folder(folder: Path) -> bool:
    """Return whether a folder holds cached tokens, belongs to this user, and has no links.

    Raises:
        OSError: it lacks a file.
    """
    return (
        _is_token_folder(folder)
        and is_owned_by_user(folder.lstat(), folder.parent)
        and all(unsafe_reason(folder / name) is None for name in (TOKENS, ABOUT, SKIPPED))
    )


def _checksum_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _validate(file: Path) -> None:
    """Validate all offsets in a file, because pyarrow reads from where they point, inside of the file or not.

    Raises:
        ValueError: the columns are not ours.
        ArrowException: an offset is out of range, or the file is invalid.
        DataError: a buffer expands to a multiple of its size.
    """
    with file.open("rb") as opened, pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
        if stream.schema != SCHEMA:
            raise ValueError(f"other columns: {stream.schema.names}")
        check_messages(opened, SCHEMA, range(len(SCHEMA)), file.name)
        for batch in stream:
            batch.validate(full=True)


def write_tokens(key: str, fill: Callable[[TokenWriter], TokenizedDataset]) -> StoredTokens:
    """Cache the tokens that `fill` writes under `key`, complete or not at all, and return them.

    Raises:
        DataError: the directory can't be written to, or holds something else of that name.
    """
    folder = cache_folder("data") / key

    def write(staged: Path) -> None:
        staged.chmod(PRIVATE_FOLDER)
        writer = TokenWriter(staged)
        try:
            about = fill(writer)
        finally:
            writer.close()
        content = {**asdict(about), CHECKSUM: _checksum_of(staged / TOKENS)}
        write_file(staged / ABOUT, json.dumps(content), mode=PRIVATE_FILE)

    check_writable()
    _check_replaceable(folder)
    _delete_old(folder)
    try:
        write_directory(folder, write)
    except OSError as error:
        if isinstance(error, QloraError):
            raise
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process has written the same meanwhile
            raise DataError(
                f"tokens can't be cached in {folder.parent}: {error.strerror}",
                hint="Free disk space there, or set QLORA_CACHE to another directory.",
            ) from error
    stored = load(key)
    assert stored is not None, "tokens that were just written"
    return stored


def check_writable() -> None:
    """Check that tokens can be cached, and make the directory for them.

    Raises:
        DataError: it can't be written to.
    """
    directory = cache_folder("data")
    hint = "Set QLORA_CACHE to another directory."
    try:
        private_folder(directory)
    except OSError as error:
        raise DataError(f"tokens can't be cached in {directory}: {error.strerror}", hint=hint) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise DataError(f"tokens can't be cached in {directory}: it can't be written to", hint=hint)


def _check_replaceable(folder: Path) -> None:
    names = _names_in(folder)
    is_table = names is not None and names <= FILES
    if os.path.lexists(folder) and not folder.is_symlink() and not is_table:
        raise DataError(
            f"tokens can't be cached in {folder}: it holds something else, or is another user's",
            hint="Move it away, or set QLORA_CACHE to another directory.",
        )


def _as_batch(records: Sequence[TokenRow]) -> pa.RecordBatch:
    columns = [_lists([row.input_ids for row in records]), _lists([row.labels for row in records])]
    columns += [pa.array(values, pa.int64()) for values in list(zip(*records, strict=True))[2:]]
    return pa.record_batch(columns, schema=SCHEMA)


def _lists(rows: Sequence[NDArray[np.int32]]) -> pa.ListArray:
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows), pa.int32()))


def _delete_old(current: Path) -> None:
    """Delete the least recently used tokens beyond a number, and the remains of killed writers.

    The cache directory may have other folders: only those with the name and the files of cached tokens are deleted.
    """
    clear_leftovers(current.parent)
    folders = sorted(
        (path for path in current.parent.iterdir() if path != current and _is_token_folder(path)), key=_last_used
    )
    for path in folders[: max(0, len(folders) + 1 - MAX_TABLES)]:
        if _last_used(path) < time.time() - MIN_UNUSED_SECONDS:
            with suppress(OSError):  # another process has just deleted it
                discard(path)


def _is_token_folder(folder: Path) -> bool:
    names = _names_in(folder) if is_digest(folder.name) and not folder.is_symlink() else None
    return names is not None and bool(names) and names <= FILES


def _names_in(folder: Path) -> set[str] | None:
    """Return the names in a folder; None if it is not a folder, or not readable."""
    try:
        return {path.name for path in folder.iterdir()}
    except OSError:
        return None


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:  # another process has just deleted it
        return 0.0
