"""Find a data set: a local file, a directory of files, or a hub id. Imports neither torch nor datasets."""

from dataclasses import dataclass
from pathlib import Path

from qlora_cli.errors import DataError, DatasetNotFoundError, QloraError
from qlora_cli.files import existing_path

# What `datasets` calls the reader of a suffix.
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
LONGEST_HUB_ID = 96


@dataclass(frozen=True, kw_only=True)
class DatasetSource:
    """Either local `files`, all of one `reader`, or a hub id."""

    name: str
    reader: str | None = None
    files: tuple[Path, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether the rows lie on this disk."""
        return bool(self.files)


def find_dataset(name: str) -> DatasetSource:
    """Return where the data set `name` is.

    Raises:
        DatasetNotFoundError: no such file or directory, and it can't be a hub id.
        DataError: a file of a kind that is not read, an empty one, or a directory without any.
    """
    path = existing_path(name)
    if path is not None and path.is_dir():
        return _find_in_directory(name, path)
    if path is not None and path.is_file():
        return DatasetSource(name=name, reader=_reader_of(path), files=(_not_empty(path),))
    if Path(name).suffix in READERS or name.startswith(("/", "./", "../", "~")) or not _may_be_hub_id(name):
        raise DatasetNotFoundError(f"no data set at {name}: no such file", hint="Check the path.")
    return DatasetSource(name=name)


def _may_be_hub_id(name: str) -> bool:
    return name.count("/") <= 1 and len(name) <= LONGEST_HUB_ID


def check_dataset_name(name: str) -> QloraError | None:
    """Return what is wrong with a data set's name, as far as this machine can tell at once."""
    try:
        find_dataset(name)
    except QloraError as error:
        return error
    return None


def _find_in_directory(name: str, directory: Path) -> DatasetSource:
    files = sorted(path for path in directory.iterdir() if path.suffix in READERS and path.is_file())
    readers = {_reader_of(path) for path in files}
    if not files:
        raise DataError(f"{directory} holds no data: no {_suffixes()} file", hint="Check the path.")
    if len(readers) > 1:
        raise DataError(
            f"{directory} mixes kinds of files ({', '.join(sorted(path.name for path in files)[:4])}, …)",
            hint="Name one file, or keep one kind in the directory.",
        )
    return DatasetSource(name=name, reader=readers.pop(), files=tuple(_not_empty(path) for path in files))


def _reader_of(path: Path) -> str:
    if path.suffix not in READERS:
        raise DataError(f"{path} is of a kind that is not read", hint=f"Use a {_suffixes()} file.")
    return READERS[path.suffix]


def _not_empty(path: Path) -> Path:
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty", hint="Give a file with at least one row.")
    return path


def _suffixes() -> str:
    return ", ".join(READERS)
