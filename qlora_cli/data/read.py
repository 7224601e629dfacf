"""Read rows through `datasets`, and say which row of which file is broken when it can't."""

import csv
import json
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.exceptions import DatasetNotFoundError as HubDatasetNotFoundError
from datasets.utils.logging import disable_progress_bar

from qlora_cli.data.sources import DatasetSource
from qlora_cli.errors import DataError, DatasetNotFoundError


def read_rows(source: DatasetSource, split: str) -> Dataset:
    """Return the rows of `source`; `split` is that of a hub data set.

    Raises:
        DataError: a file is not what its suffix says, naming the row.
        DatasetNotFoundError: the hub has no such data set or split.
    """
    disable_progress_bar()
    rows = _read_files(source) if source.is_local else _read_hub(source.name, split)
    if len(rows) == 0:
        raise DataError(f"{source.name} has no rows", hint="Give a data set with at least one row.")
    return rows


def _read_files(source: DatasetSource) -> Dataset:
    assert source.reader is not None
    for path in source.files:
        if source.reader in ("json", "csv"):
            _check_encoding(path)
    try:
        return load_dataset(source.reader, data_files=[str(path) for path in source.files], split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:
        for path in source.files:
            if problem := _diagnose(path):
                raise problem from error
        cause = error.__cause__ or error
        raise DataError(
            f"{source.name} can't be read: {cause}", hint="Do all rows have the same columns and types?"
        ) from error


def _read_hub(name: str, split: str) -> Dataset:
    try:
        return load_dataset(name, split=split)
    except (HubDatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise DatasetNotFoundError(
            f"no data set at {name!r}: no such file or directory, and the hub does not have it or can't be reached",
            hint="Check the name; for a private data set run: hf auth login",
        ) from error
    except ValueError as error:
        raise DataError(f"{name} can't be read: {error}", hint="Choose a split with --set data.split=NAME.") from error


def _check_encoding(path: Path) -> None:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not UTF-8 text (byte {error.start} of the line)",
                    hint="Convert the file, for example with: iconv -f latin1 -t utf-8",
                ) from error


def _diagnose(path: Path) -> DataError | None:
    """Return what is wrong with a file that `datasets` could not read, if it can be found."""
    if path.suffix == ".jsonl":
        return _diagnose_lines(path)
    if path.suffix == ".json":
        return _diagnose_json(path)
    if path.suffix == ".csv":
        return _diagnose_csv(path)
    return None


def _diagnose_lines(path: Path) -> DataError | None:
    row = 0
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row += 1
            try:
                value = json.loads(line)
            except ValueError as error:
                return DataError(
                    f"{path}, row {row} (line {number}): broken JSON: {error}",
                    hint="Each line is one JSON object.",
                )
            if not isinstance(value, dict):
                return DataError(
                    f"{path}, row {row} (line {number}): expected a JSON object, found {type(value).__name__}",
                    hint='For example: {"prompt": "…", "completion": "…"}',
                )
    return None


def _diagnose_json(path: Path) -> DataError | None:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except ValueError as error:
        # A .json file may also hold one object a line.
        return _diagnose_lines(path) or DataError(f"{path}: broken JSON: {error}", hint="Give a list of objects.")
    if not isinstance(rows, list):
        return DataError(f"{path}: expected a list of objects, found {type(rows).__name__}")
    for row, value in enumerate(rows, start=1):
        if not isinstance(value, dict):
            return DataError(f"{path}, row {row}: expected an object, found {type(value).__name__}")
    return None


def _diagnose_csv(path: Path) -> DataError | None:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        for row, values in enumerate(reader, start=1):
            if values and len(values) != len(header):
                return DataError(
                    f"{path}, row {row} (line {reader.line_num}): {len(values)} fields, the header has {len(header)}",
                    hint="Quote fields that hold commas or line breaks.",
                )
    return None
