"""Scan a directory for data files, grouped by split where splits can be identified.

Metadata files identify the splits that libraries write: by `save_to_disk`, in the cache of `datasets`, or with a card
as on the hub. Otherwise the names of files and folders do. A test split is never read unless it is requested.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from qlora_cli.data.finding.data_card import CARD, read_card_configs, select_config, split_files
from qlora_cli.data.finding.file_types import is_data_file, may_be_path, printable, supported_suffixes
from qlora_cli.data.finding.globs import directories_below
from qlora_cli.data.finding.split_names import (
    SPLIT_WORDS,
    TRAIN,
    matching_splits,
    shard_of,
    split_of_shard,
    splits_in_name,
    splits_in_path,
)
from qlora_cli.data.limits import join_names
from qlora_cli.errors import DataError
from qlora_cli.files import open_regular
from qlora_cli.units import counted

DATASET_DICT, STATE_FILE, INFO_FILE = "dataset_dict.json", "state.json", "dataset_info.json"
MAX_METADATA_BYTES = 16 * 1024**2
MAX_SHOWN_FOLDERS, MAX_SEARCHED_DIRECTORIES = 5, 1000
DATA_FOLDER, METADATA_STEM, INCOMPLETE_SUFFIX = "data", "metadata", ".incomplete"


@dataclass(frozen=True, kw_only=True)
class Split:
    """The files of a split, sorted; none if the split is declared, but its files are missing."""

    name: str
    files: tuple[Path, ...]

    def describe(self) -> str:
        """Return the name of the split with its file or their number: `test (dev.jsonl)`."""
        return f"{self.name} ({describe_files(self.files)})"


@dataclass(frozen=True, kw_only=True)
class DataDirectory:
    """The data files of a directory.

    Attributes:
        path: The directory.
        splits: Its splits; none if nothing identifies any.
        files: All of its data files, if it has no splits.
        ambiguous: Files whose names match several splits.
        unassigned: Metadata files, and files without a split in a directory with splits.
        folders: Subfolders with data, of which no file is read.
        other_configs: Its other configs, if the one that is read was not requested by name.
    """

    path: Path
    splits: tuple[Split, ...] = ()
    files: tuple[Path, ...] = ()
    ambiguous: tuple[Path, ...] = ()
    unassigned: tuple[Path, ...] = ()
    folders: tuple[Path, ...] = ()
    other_configs: tuple[str, ...] = ()

    @property
    def has_splits(self) -> bool:
        """Whether any splits are identified."""
        return bool(self.splits or self.ambiguous)

    def split(self, requested: str, name: str) -> Split:
        """Return the requested split of a directory that has splits; `name` is the data set's name, for messages.

        Raises:
            DataError: there is no such split, or the request is ambiguous.
        """
        for path in self.ambiguous:
            if splits_in_name(requested) & splits_in_path(path.relative_to(self.path)):
                raise DataError(
                    f"{name}: {printable(path)} may be of {requested} or of another split: its name matches both",
                    hint="Rename it, or name the files to read.",
                )
        matching = [
            split
            for split in self.splits
            if split.name in matching_splits((each.name for each in self.splits), requested)
        ]
        if len(matching) != 1:
            raise self._no_single_split(requested, matching, name)
        if not matching[0].files:
            raise DataError(
                f"{name}: its split {matching[0].name} is declared, but has no files; "
                f"it holds {self._describe_splits()}",
                hint="Download it again.",
            )
        return matching[0]

    def _no_single_split(self, requested: str, matching: Sequence[Split], name: str) -> DataError:
        problem = (
            f"{' and '.join(split.name for split in matching)} for the split {requested}"
            if matching
            else f"no split {requested}"
        )
        # Suggest another split than train for evaluation.
        remaining = sorted(self.splits, key=lambda split: requested != TRAIN and split.name == TRAIN)
        first = next(iter([*matching, *remaining]), None)
        hint = "Name the files to read." if first is None else f"Name one of them: {name}::{first.name}"
        return DataError(f"{name} has {problem}; it holds {self._describe_splits()}", hint=hint)

    def _describe_splits(self) -> str:
        return join_names([split.describe() for split in self.splits if split.files]) or "files of ambiguous splits"


def describe_files(files: Sequence[Path]) -> str:
    """Return the name of a single file, or the number of files."""
    return printable(Path(files[0].name)) if len(files) == 1 else f"{len(files):,} files"


def describe_folder(folder: Path) -> str:
    """Return the name of a folder, with the number of its data files: `folder raw (2 files)`."""
    files = [
        file for each in islice(directories_below(folder), MAX_SEARCHED_DIRECTORIES) for file in _data_files_in(each)
    ]
    return f"folder {printable(Path(folder.name))} ({counted(len(files), 'file')})"


def scan_directory(path: Path, config: str | None = None, name: str | None = None) -> DataDirectory:
    """Return the data files of the directory at `path`, or of its `config`; `name` is its name, for messages.

    Raises:
        DataError: it can't be read, contains no data, or lacks the config; or it has several, and none was requested.
    """
    name = name or printable(path)
    entries = _visible_entries(path)
    if configs := read_card_configs(path):
        selected = select_config(configs, config, name)
        other_configs = () if config else tuple(entry.name for entry in configs if entry != selected)
        if selected.patterns:
            return DataDirectory(path=path, splits=_splits(split_files(selected)), other_configs=other_configs)
        if selected.folder != path:
            return replace(scan_directory(selected.folder, name=name), other_configs=other_configs)
    elif config:
        raise DataError(f"{name} has no config {config}: no {CARD} in it names any", hint=f"Leave :{config} out.")
    return (
        _from_save_to_disk(path)
        or _from_datasets_cache(path, entries)
        or _from_names(path, entries)
        or _from_subfolder(path, entries)
    )


def _splits(files: Mapping[str, Iterable[Path]]) -> tuple[Split, ...]:
    """Return splits in order: train, validation and test, then others by name."""
    order = sorted(
        files, key=lambda name: (list(SPLIT_WORDS).index(name) if name in SPLIT_WORDS else len(SPLIT_WORDS), name)
    )
    return tuple(Split(name=name, files=tuple(sorted(files[name]))) for name in order)


def _from_save_to_disk(path: Path) -> DataDirectory | None:
    """Return the files of a directory that `save_to_disk` wrote, of a data set or of a folder per split."""
    if names := _last_parts(_read_json_object(path / DATASET_DICT).get("splits")):
        return DataDirectory(path=path, splits=_splits({name: _files_of_save_to_disk(path / name) for name in names}))
    files = _files_of_save_to_disk(path)
    return DataDirectory(path=path, files=files) if files else None


def _files_of_save_to_disk(path: Path) -> tuple[Path, ...]:
    """Return the files of one data set that `save_to_disk` wrote; none if it did not write the directory."""
    data_files = _read_json_object(path / STATE_FILE).get("_data_files")
    if not isinstance(data_files, list) or not all(isinstance(entry, dict) for entry in data_files):
        return ()
    return tuple(path / name for name in _last_parts([entry.get("filename") for entry in data_files]))


def _last_parts(values: object) -> list[str]:
    """Return the file names of paths; an empty list if one of them is not a valid name."""
    if not isinstance(values, list):
        return []
    names = [Path(value).name if may_be_path(value) else "" for value in values]
    return names if all(name not in ("", "..") for name in names) else []


def _from_datasets_cache(path: Path, entries: Iterable[Path]) -> DataDirectory | None:
    """Return the files in a cache directory of `datasets`: NAME-SPLIT.arrow, or shards of it."""
    splits = _read_json_object(path / INFO_FILE).get("splits")
    if not isinstance(splits, dict):
        return None
    files = {
        str(split): [entry for entry in entries if is_data_file(entry) and _belongs_to(entry, split)]
        for split in splits
    }
    return DataDirectory(path=path, splits=_splits(files)) if any(files.values()) else None


def _belongs_to(path: Path, split: str) -> bool:
    shard = shard_of(path.name)
    return (shard.prefix if shard else path.name.partition(".")[0]).endswith(f"-{split}")


def _read_json_object(path: Path) -> Mapping[str, Any]:
    """Return the object in a JSON metadata file; empty if the file is missing or holds something else."""
    try:
        with open_regular(path) as file:
            content = file.read(MAX_METADATA_BYTES + 1)
        value = json.loads(content) if len(content) <= MAX_METADATA_BYTES else {}
    except (OSError, ValueError, RecursionError):  # a file of the user's that only has this name
        return {}
    return value if isinstance(value, dict) else {}


def _from_names(path: Path, entries: Sequence[Path]) -> DataDirectory | None:
    """Return the files in a directory, and in its folders that are named after splits, by split."""
    files = [entry for entry in entries if is_data_file(entry)]
    folders = [entry for entry in entries if splits_in_name(entry.name) and entry.is_dir()]
    data = path / DATA_FOLDER
    if not folders and data in entries and not any(splits_in_name(file.name) for file in files):
        nested = _from_names(data, _visible_entries(data))
        if nested and (nested.has_splits or not files):
            unread = _unread_folders([entry for entry in entries if entry != data], in_use=())
            return replace(nested, unassigned=(*files, *nested.unassigned), folders=(*nested.folders, *unread))
    in_folders = [
        file for folder in folders for directory in directories_below(folder) for file in _data_files_in(directory)
    ]
    files = sorted({*files, *in_folders})
    if not files:
        return None
    return replace(_group_by_split(path, files), folders=_unread_folders(entries, in_use=folders))


def _unread_folders(entries: Iterable[Path], in_use: Collection[Path]) -> tuple[Path, ...]:
    """Return the folders with data among `entries` that are not `in_use`, but for links to one above."""
    return tuple(
        entry
        for entry in entries
        if entry not in in_use and entry.is_dir() and not _leads_up(entry) and _has_data(entry)
    )


def _leads_up(folder: Path) -> bool:
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def _visible_entries(path: Path) -> list[Path]:
    try:
        return sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}", hint="Check its permissions.") from error


def _data_files_in(path: Path) -> list[Path]:
    return [entry for entry in _visible_entries(path) if is_data_file(entry)]


def _group_by_split(path: Path, files: Sequence[Path]) -> DataDirectory:
    unassigned = [file for file in files if file.name.partition(".")[0] == METADATA_STEM]
    if len(unassigned) == len(files):
        unassigned = []
    splits_of_file = {file: splits_in_path(file.relative_to(path)) for file in files if file not in unassigned}
    if not any(splits_of_file.values()):
        return DataDirectory(path=path, files=tuple(splits_of_file), unassigned=tuple(unassigned))
    splits: dict[str, list[Path]] = {}
    without_split = []
    for file, names in splits_of_file.items():
        prefix = split_of_shard(file.relative_to(path))
        if len(names) == 1 or (not names and prefix):
            splits.setdefault(next(iter(names), prefix or ""), []).append(file)
        elif not names:
            without_split.append(file)
    if not matching_splits(splits, TRAIN) and without_split:
        splits[TRAIN], without_split = without_split, []
    ambiguous = tuple(file for file, names in splits_of_file.items() if len(names) > 1)
    return DataDirectory(
        path=path, splits=_splits(splits), ambiguous=ambiguous, unassigned=tuple(unassigned + without_split)
    )


def _from_subfolder(path: Path, entries: Sequence[Path]) -> DataDirectory:
    """Return the only subfolder with data, if it has splits; the cache of `datasets` nests such folders.

    Raises:
        DataError: it has no splits, or there is no such folder, or several.
    """
    folders = [entry for entry in entries if entry.is_dir() and _has_data(entry)]
    if len(folders) == 1 and (directory := scan_directory(folders[0])).has_splits:
        return directory
    candidates = [candidate for folder in folders for candidate in _data_directories(folder)]
    first = ", ".join(map(printable, candidates[:MAX_SHOWN_FOLDERS]))
    more = f", and {len(candidates) - MAX_SHOWN_FOLDERS:,} more" if len(candidates) > MAX_SHOWN_FOLDERS else ""
    raise DataError(
        f"{path} holds no data: no {supported_suffixes()} file",
        hint=f"Its subfolders do; give one: {first}{more}" if candidates else "Check the path.",
    )


def _has_data(path: Path) -> bool:
    """Return whether a directory, or one below it, contains data and is not an incomplete download."""
    return path.suffix != INCOMPLETE_SUFFIX and any(
        map(_data_files_in, islice(directories_below(path), MAX_SEARCHED_DIRECTORIES))
    )


def _data_directories(path: Path) -> Iterator[Path]:
    """Yield the directory itself if it can be read as a data set, or else those below it that can."""
    entries = _visible_entries(path)
    if _from_save_to_disk(path) or _from_datasets_cache(path, entries) or _from_names(path, entries):
        yield path
        return
    for folder in entries:
        if folder.is_dir() and _has_data(folder):
            yield from _data_directories(folder)
