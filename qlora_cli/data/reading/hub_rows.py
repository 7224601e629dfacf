"""Read rows of data sets on the hub, and translate the errors of the libraries involved."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_cli.data.finding.sources import DatasetSource, similar_local_name
from qlora_cli.data.reading.columnar import TableBatches, rows_of_batches
from qlora_cli.data.reading.parquet_groups import BATCH_ROWS
from qlora_cli.data.reading.raw import SELECT_ALL, RawRow, Selection
from qlora_cli.data.reading.sampling import sample_indices, too_few_rows
from qlora_cli.errors import DataError, DatasetNotFoundError, QloraError

SHUFFLE_ROWS = 10_000
COMMIT = re.compile(r"[0-9a-f]{40}")
# In the messages of `datasets` about a missing config or split; both lists are in Python syntax.
KNOWN_CONFIGS = re.compile(r"(?is)config.*(?:Available|available configs|in the cache): (\[.*?\])")
KNOWN_SPLITS = re.compile(r"(?is)split.*(?:Should be one of|Available splits:) (\[.*?\])")


def read_hub(
    source: DatasetSource, *, split: str, seed: int, streaming: bool, selection: Selection = SELECT_ALL
) -> Iterator[RawRow]:
    """Yield the rows of a hub data set; when streaming, the rows of a sample are numbered in the order of arrival.

    Columns that are not selected are None in every row.

    Raises:
        DatasetNotFoundError: the hub has no such data set or revision, or can't be reached.
        DataError: it has no such config or split, or fewer rows than requested, or can't be read.
    """
    with _translate_errors(source):
        loaded = _load(source, split, streaming)
        rows = _as_arrow(loaded, selection, source.name)
        numbers: list[int] | None = None
        if source.num_rows is not None and streaming:
            rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS).take(source.num_rows)
        elif source.num_rows is not None:
            numbers = [int(index) + 1 for index in sample_indices(source, len(rows), seed)]
            rows = rows.select([number - 1 for number in numbers])
        count = 0
        for count, row in enumerate(_rows_in_tables(rows, loaded.column_names, selection, source.name), start=1):
            yield row._replace(number=numbers[count - 1] if numbers else count)
        if source.num_rows is not None and count < source.num_rows:
            raise too_few_rows(source, count)


def resolve_hub(source: DatasetSource) -> str:
    """Return the commit of a hub data set, 40 hex digits; from the local cache if the hub can't be reached.

    Raises:
        DatasetNotFoundError: no such data set or revision, or the hub can't be reached and nothing is in the cache.
    """
    from huggingface_hub import HfApi, constants

    if source.revision and COMMIT.fullmatch(source.revision):
        return source.revision
    assert source.repository is not None
    try:
        with _translate_errors(source):
            timeout = constants.HF_HUB_ETAG_TIMEOUT
            commit = HfApi().dataset_info(source.repository, revision=source.revision, timeout=timeout).sha
    except _RowsUnreachableError as error:
        commit = _cached_commit(source)
        if commit is None:
            raise DatasetNotFoundError(error.message, hint=error.hint) from error
    if commit is None:
        raise DatasetNotFoundError(
            f"the server that answered for {source.repository} is not a hub: it names no commit"
        )
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
    # The revision as given: if it were the commit, the cache would not record which commit a branch points to.
    builder = load_dataset_builder(source.repository, source.config, revision=source.revision)
    if builder.hash != commit:
        raise _stale_cache_error(source, commit, builder.hash)
    if streaming:
        return builder.as_streaming_dataset(split=source.split or split)
    builder.download_and_prepare()
    return builder.as_dataset(split=source.split or split)


def _stale_cache_error(source: DatasetSource, expected: str, cached: str) -> DatasetNotFoundError:
    """Return the error for `datasets` using another commit from its cache, as it does when the hub is unreachable."""
    return DatasetNotFoundError(
        f"{source.name} is commit {expected[:12]}, but the local cache was last filled with {cached[:12]}",
        hint="Run it again when the hub is reachable, or name the other commit as OWNER/NAME@COMMIT.",
    )


def _as_arrow(rows: Any, selection: Selection, name: str) -> Any:
    """Return rows as Arrow tables of the selected columns, or of all columns of a stream that does not declare them.

    As tables, because `datasets` would decode every image and sound in rows.
    """
    from qlora_cli.data.reading.arrow_batches import selected_columns

    tables = rows.with_format("arrow")
    if rows.features is None:
        return tables
    return tables.select_columns(selected_columns(rows.features.arrow_schema, selection, name))


def _rows_in_tables(tables: Any, names: Sequence[str] | None, selection: Selection, name: str) -> Iterator[RawRow]:
    """Yield the rows of tables; `names` are those of all columns, of which the tables have the selected ones."""
    from qlora_cli.data.reading.arrow_batches import selected_columns

    number = 1
    for table in tables.iter(batch_size=BATCH_ROWS):
        columns = table.column_names if names is not None else selected_columns(table.schema, selection, name)
        yield from rows_of_batches(
            name, TableBatches(names or table.column_names, columns, table.to_batches()), number, selection
        )
        number += table.num_rows


class _RowsUnreachableError(DatasetNotFoundError):
    """The hub can't be reached."""


@contextmanager
def _translate_errors(source: DatasetSource) -> Iterator[None]:
    """Turn the errors of the libraries into a `QloraError`."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError
    from pyarrow import ArrowException

    # From httpx or httpx2, whichever the hub's client uses.
    http_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        yield
    except QloraError:
        raise
    except (DatasetsError, ArrowException, http_error, OSError, ValueError, RuntimeError) as error:
        raise _translate(error, source) from error


def _translate(error: Exception, source: DatasetSource) -> QloraError:
    from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError
    from huggingface_hub.errors import GatedRepoError

    repository, message = source.repository, str(error)
    if _is_unreachable(error):
        return _RowsUnreachableError(
            f"no data set at {repository!r}: no such file or directory, not in the local cache, and the hub can't be "
            f"reached ({_unreachable_reason(error)})",
            hint=_similar_name_hint(source) or "Check the name, and the network.",
        )
    if isinstance(error, GatedRepoError) or "gated dataset" in message:
        return DatasetNotFoundError(
            f"{repository} is gated: this account has no access to it",
            hint=f"Ask for access at https://huggingface.co/datasets/{repository}, then run: hf auth login",
        )
    if _is_missing_revision(error):
        return DatasetNotFoundError(
            f"{repository} has no revision {source.revision!r}", hint="Give a branch, tag or commit."
        )
    if isinstance(error, DataFilesNotFoundError) or type(error).__name__ == "EmptyDatasetError":
        return DataError(f"{repository} holds no data: no file of a supported type", hint="Look at its files.")
    if _is_missing(error):
        return DatasetNotFoundError(
            f"no data set at {repository!r}: no such file or directory, and the hub does not have it",
            hint=_similar_name_hint(source) or "Check the name; for a private data set run: hf auth login",
        )
    if isinstance(error, DatasetGenerationError):
        message = str(error.__cause__ or error)
    return _unreadable_error(message, source)


def _similar_name_hint(source: DatasetSource) -> str | None:
    """Return a hint that names the local data whose name is most like that of the missing repository."""
    similar = similar_local_name(str(source.repository))
    return similar and f"Did you mean {similar}, which is on this disk?"


def _is_unreachable(error: Exception) -> bool:
    """Return whether the hub did not respond, or responded that it is overloaded or failing."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code == 429
    return isinstance(error, ConnectionError | HfHubHTTPError.__bases__[0])


def _unreachable_reason(error: Exception) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE=1 is set"
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


def _unreadable_error(message: str, source: DatasetSource) -> DataError:
    hint = "Do all of its rows have the same columns and types?"
    if configs := _quoted_names(KNOWN_CONFIGS, message):
        hint = f"It has {', '.join(configs)}; for the first one write {source.repository}:{configs[0]}"
    elif splits := _quoted_names(KNOWN_SPLITS, message):
        name = f"{source.repository}:{source.config or ''}:{splits[0]}"
        hint = f"It has {', '.join(splits)}; for the first one write {name}, or --set data.split={splits[0]}"
        if re.match(r"Bad split: \S*\[", message):
            hint = "A part of a split can't be streamed; take a sample instead, as #500."
    elif message.startswith("Dataset scripts"):
        hint = f"The hub may have made Parquet files of it: {source.repository}@refs/convert/parquet"
    return DataError(f"{source.name} can't be read: {_first_line(message)}", hint=hint)


def _quoted_names(pattern: re.Pattern[str], message: str) -> list[str]:
    match = pattern.search(message)
    return re.findall(r"'([^']+)'", match[1]) if match else []


def _first_line(message: str) -> str:
    return message.splitlines()[0] if message else "no reason is given"
