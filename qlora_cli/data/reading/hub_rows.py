"""Rows of data sets on the hub, and every way in which getting them fails."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_cli.data.finding.sources import DatasetSource, called_alike
from qlora_cli.data.reading.columnar import BatchReader, rows_of_batches
from qlora_cli.data.reading.parquet_groups import BATCH_ROWS
from qlora_cli.data.reading.raw import EVERYTHING, RawRow, Wanted
from qlora_cli.data.reading.sampling import choose, too_few
from qlora_cli.errors import DataError, DatasetNotFoundError, QloraError

SHUFFLE_ROWS = 10_000
COMMIT = re.compile(r"[0-9a-f]{40}")
# What `datasets` says when a config or a split is not there; both lists are written as Python writes them.
KNOWN_CONFIGS = re.compile(r"(?is)config.*(?:Available|available configs|in the cache): (\[.*?\])")
KNOWN_SPLITS = re.compile(r"(?is)split.*(?:Should be one of|Available splits:) (\[.*?\])")


def read_hub(
    source: DatasetSource, *, split: str, seed: int, streaming: bool, wanted: Wanted = EVERYTHING
) -> Iterator[RawRow]:
    """Yield the rows of a hub data set; when streaming, a sample is numbered in the order in which it comes.

    Of columns that are not `wanted`, a row has the names alone, with None for their values.

    Raises:
        DatasetNotFoundError: the hub has no such data set or revision, or can't be reached.
        DataError: it has no such config or split, fewer rows than asked for, or can't be read.
    """
    with _explained(source):
        opened = _load(source, split, streaming)
        rows = _as_tables(opened, wanted, source.name)
        numbers: list[int] | None = None
        if source.num_rows is not None and streaming:
            rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS).take(source.num_rows)
        elif source.num_rows is not None:
            numbers = [int(index) + 1 for index in choose(source, len(rows), seed)]
            rows = rows.select([number - 1 for number in numbers])
        count = 0
        for count, row in enumerate(_rows_of(rows, opened.column_names, wanted, source.name), start=1):
            yield row._replace(number=numbers[count - 1] if numbers else count)
        if source.num_rows is not None and count < source.num_rows:
            raise too_few(source, count)


def resolve_hub(source: DatasetSource) -> str:
    """Return the commit of a hub data set, 40 hex digits; from the cache if the hub can't be asked.

    Raises:
        DatasetNotFoundError: no such data set or revision, or no way to ask and nothing in the cache.
    """
    from huggingface_hub import HfApi, constants

    if source.revision and COMMIT.fullmatch(source.revision):
        return source.revision
    assert source.repository is not None
    try:
        with _explained(source):
            timeout = constants.HF_HUB_ETAG_TIMEOUT
            commit = HfApi().dataset_info(source.repository, revision=source.revision, timeout=timeout).sha
    except _RowsUnreachableError as error:
        commit = _cached_commit(source)
        if commit is None:
            raise DatasetNotFoundError(error.message, hint=error.hint) from error
    if commit is None:
        raise DatasetNotFoundError(f"what answered for {source.repository} is no hub: it names no commit")
    return commit


def _cached_commit(source: DatasetSource) -> str | None:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=str(source.repository), repo_type="dataset")
    path = Path(constants.HF_HUB_CACHE) / folder / "refs" / (source.revision or constants.DEFAULT_REVISION)
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _load(source: DatasetSource, split: str, streaming: bool) -> Any:
    from datasets import load_dataset_builder
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    commit = resolve_hub(source)
    # The revision as it was given: with the commit in its place, the cache would not learn what the name stands for.
    builder = load_dataset_builder(source.repository, source.config, revision=source.revision)
    if builder.hash != commit:
        raise _other_commit(source, commit, builder.hash)
    if streaming:
        return builder.as_streaming_dataset(split=source.split or split)
    builder.download_and_prepare()
    return builder.as_dataset(split=source.split or split)


def _other_commit(source: DatasetSource, wanted: str, found: str) -> DatasetNotFoundError:
    """Return the error for what `datasets` does when the hub is away: take any commit from its cache."""
    return DatasetNotFoundError(
        f"{source.name} is commit {wanted[:12]}, but the local cache was last filled with {found[:12]}",
        hint="Run it again with the hub in reach, or name the other commit as OWNER/NAME@COMMIT.",
    )


def _as_tables(rows: Any, wanted: Wanted, name: str) -> Any:
    """Return rows as tables of the columns in use, or of all that a stream has if that shows when it is read.

    As tables, because `datasets` decodes every image and every sound of what it gives as values.
    """
    from qlora_cli.data.reading.arrow_batches import columns_to_read

    tables = rows.with_format("arrow")
    if rows.features is None:
        return tables
    return tables.select_columns(columns_to_read(rows.features.arrow_schema, wanted, name))


def _rows_of(tables: Any, names: Sequence[str] | None, wanted: Wanted, name: str) -> Iterator[RawRow]:
    """Yield the rows of tables; `names` are those of all columns, of which the tables have those in use."""
    from qlora_cli.data.reading.arrow_batches import columns_to_read

    number = 1
    for table in tables.iter(batch_size=BATCH_ROWS):
        columns = table.column_names if names is not None else columns_to_read(table.schema, wanted, name)
        yield from rows_of_batches(name, BatchReader(names or table.column_names, columns, table.to_batches()), number)
        number += table.num_rows


class _RowsUnreachableError(DatasetNotFoundError):
    """The hub can't be asked."""


@contextmanager
def _explained(source: DatasetSource) -> Iterator[None]:
    """Turn what the libraries raise into errors of ours."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError
    from pyarrow import ArrowException

    # Of httpx or httpx2, whichever the client is built on.
    http_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        yield
    except QloraError:
        raise
    except (DatasetsError, ArrowException, http_error, OSError, ValueError, RuntimeError) as error:
        raise _explain(error, source) from error


def _explain(error: Exception, source: DatasetSource) -> QloraError:
    from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError
    from huggingface_hub.errors import GatedRepoError

    repository, words = source.repository, str(error)
    if _is_away(error):
        return _RowsUnreachableError(
            f"no data set at {repository!r}: no such file or directory, not in the local cache, and the hub can't be "
            f"reached ({_why_away(error)})",
            hint=_near(source) or "Check the name, and the network.",
        )
    if isinstance(error, GatedRepoError) or "gated dataset" in words:
        return DatasetNotFoundError(
            f"{repository} is gated: this account has no access to it",
            hint=f"Ask for access at https://huggingface.co/datasets/{repository}, then run: hf auth login",
        )
    if _is_missing_revision(error):
        return DatasetNotFoundError(
            f"{repository} has no revision {source.revision!r}", hint="Give a branch, tag or commit."
        )
    if isinstance(error, DataFilesNotFoundError) or type(error).__name__ == "EmptyDatasetError":
        return DataError(f"{repository} holds no data: no file of a kind that is read", hint="Look at its files.")
    if _is_missing(error):
        return DatasetNotFoundError(
            f"no data set at {repository!r}: no such file or directory, and the hub does not have it",
            hint=_near(source) or "Check the name; for a private data set run: hf auth login",
        )
    if isinstance(error, DatasetGenerationError):
        words = str(error.__cause__ or error)
    return _unreadable(words, source)


def _near(source: DatasetSource) -> str | None:
    """Return a hint at what on this disk is called most like what the hub does not have."""
    near = called_alike(str(source.repository))
    return near and f"Did you mean {near}, which is on this disk?"


def _is_away(error: Exception) -> bool:
    """Whether the hub gave no answer, or that it is out of order."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code == 429
    return isinstance(error, ConnectionError | HfHubHTTPError.__bases__[0])


def _why_away(error: Exception) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE=1 keeps it from being asked"
    return f"{type(error).__name__}: {_first_line(str(error))}"


def _is_missing_revision(error: Exception) -> bool:
    from datasets.exceptions import DatasetNotFoundError as NotFoundError
    from huggingface_hub.errors import RevisionNotFoundError

    return isinstance(error, RevisionNotFoundError) or (
        isinstance(error, NotFoundError) and str(error).startswith("Revision ")
    )


def _is_missing(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    return isinstance(error, FileNotFoundError | HFValidationError | HfHubHTTPError)


def _unreadable(words: str, source: DatasetSource) -> DataError:
    hint = "Do all of its rows have the same columns and types?"
    if configs := _names_in(KNOWN_CONFIGS, words):
        hint = f"It has {', '.join(configs)}; for the first one write {source.repository}:{configs[0]}"
    elif splits := _names_in(KNOWN_SPLITS, words):
        given = f"{source.repository}:{source.config or ''}:{splits[0]}"
        hint = f"It has {', '.join(splits)}; for the first one write {given}, or --set data.split={splits[0]}"
        if re.match(r"Bad split: \S*\[", words):
            hint = "A part of a split can't be streamed; take a sample instead, as #500."
    elif words.startswith("Dataset scripts"):
        hint = f"The hub may have made Parquet files of it: {source.repository}@refs/convert/parquet"
    return DataError(f"{source.name} can't be read: {_first_line(words)}", hint=hint)


def _names_in(pattern: re.Pattern[str], words: str) -> list[str]:
    found = pattern.search(words)
    return re.findall(r"'([^']+)'", found[1]) if found else []


def _first_line(words: str) -> str:
    return words.splitlines()[0] if words else "no reason is given"
