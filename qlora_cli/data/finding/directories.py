"""What a directory holds: files of rows, by split where something says which is of which.

What libraries write is known by what they write beside it: `save_to_disk`, the cache of `datasets`, the card of a data
set of the hub. Otherwise the names of files and folders tell. A test split is never read unless it is asked for.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from qlora_cli.data.finding.data_card import CARD, choose_config, configs_of, files_of
from qlora_cli.data.finding.file_types import is_data, kinds, may_be_path, printable
from qlora_cli.data.finding.globs import directories_below
from qlora_cli.data.finding.split_names import TRAIN, WORDS, named, shard_of, split_of_prefix, splits_told, words_in
from qlora_cli.data.limits import listed
from qlora_cli.errors import DataError
from qlora_cli.files import open_regular

DATASET_DICT, SAVED_STATE, BUILDER_INFO = "dataset_dict.json", "state.json", "dataset_info.json"
MOST_METADATA_BYTES = 16 * 1024**2
MOST_NAMED, MOST_DIRECTORIES = 5, 1000  # that are looked into for data
DATA_FOLDER, ABOUT_OTHERS, HALF_WRITTEN = "data", "metadata", ".incomplete"


@dataclass(frozen=True, kw_only=True)
class Split:
    """The files of a split, sorted; none where it is named, but not here."""

    name: str
    files: tuple[Path, ...]

    def describe(self) -> str:
        """Return its name, and its file or how many: `test (dev.jsonl)`."""
        return f"{self.name} ({of_files(self.files)})"


@dataclass(frozen=True, kw_only=True)
class Directory:
    """What a directory holds.

    Attributes:
        path: Where it is.
        splits: Its splits, by name; none if nothing tells of any.
        files: All of its files of rows, where there are no splits.
        unclear: Files whose names tell of several splits.
        others: Files that are about others, or of no split where others are.
        configs: Other configs of it than the one that these are of, which nobody named.
    """

    path: Path
    splits: tuple[Split, ...] = ()
    files: tuple[Path, ...] = ()
    unclear: tuple[Path, ...] = ()
    others: tuple[Path, ...] = ()
    configs: tuple[str, ...] = ()

    @property
    def has_splits(self) -> bool:
        """Whether anything tells of splits."""
        return bool(self.splits or self.unclear)

    def split(self, asked: str, name: str) -> Split:
        """Return the split that is asked for of a directory that has any; `name` is what the user calls it.

        Raises:
            DataError: it is not there, or several or files of several splits may be meant.
        """
        for path in self.unclear:
            if words_in(asked) & splits_told(path.relative_to(self.path)):
                raise DataError(
                    f"{name}: {printable(path)} may be of {asked} or of another split: its name tells of both",
                    hint="Rename it, or name the files to read.",
                )
        found = [split for split in self.splits if split.name in named((each.name for each in self.splits), asked)]
        if len(found) != 1:
            raise self._not_one(asked, found, name)
        if not found[0].files:
            raise DataError(
                f"{name}: no file of its split {found[0].name} is there, which is named; it holds {self._held()}",
                hint="Download it again.",
            )
        return found[0]

    def _not_one(self, asked: str, found: Sequence[Split], name: str) -> DataError:
        which = (
            f"{' and '.join(split.name for split in found)} for the split {asked}" if found else f"no split {asked}"
        )
        # What is held out is proposed from what is not trained.
        others = sorted(self.splits, key=lambda split: asked != TRAIN and split.name == TRAIN)
        first = next(iter([*found, *others]), None)
        hint = "Name the files to read." if first is None else f"Name one of them: {name}::{first.name}"
        return DataError(f"{name} has {which}; it holds {self._held()}", hint=hint)

    def _held(self) -> str:
        return listed([split.describe() for split in self.splits if split.files]) or "files of unclear splits"


def of_files(files: Sequence[Path]) -> str:
    """Return the name of a file, or how many there are."""
    return printable(Path(files[0].name)) if len(files) == 1 else f"{len(files):,} files"


def look_into(path: Path, config: str | None = None, name: str | None = None) -> Directory:
    """Return what the directory at `path` holds, or its `config`; `name` is what the user calls it.

    Raises:
        DataError: it can't be read, holds no data, has no such config, or several of which none was named.
    """
    name = name or printable(path)
    shown = _shown(path)
    if configs := configs_of(path):
        chosen = choose_config(configs, config, name)
        others = () if config else tuple(each.name for each in configs if each != chosen)
        if chosen.patterns:
            return Directory(path=path, splits=_splits(files_of(chosen)), configs=others)
        if chosen.folder != path:
            return replace(look_into(chosen.folder, name=name), configs=others)
    elif config:
        raise DataError(f"{name} has no config {config}: no {CARD} in it names any", hint=f"Leave :{config} out.")
    return _saved(path) or _cached(path, shown) or _by_names(path, shown) or _of_folders(path, shown)


def _splits(files: Mapping[str, Iterable[Path]]) -> tuple[Split, ...]:
    """Return splits: train, validation and test, then others by their names."""
    order = sorted(files, key=lambda name: (list(WORDS).index(name) if name in WORDS else len(WORDS), name))
    return tuple(Split(name=name, files=tuple(sorted(files[name]))) for name in order)


def _saved(path: Path) -> Directory | None:
    """Return what `save_to_disk` wrote, if it wrote the directory: a data set, or a folder for each split."""
    if names := _names(_metadata(path / DATASET_DICT).get("splits")):
        return Directory(path=path, splits=_splits({name: _saved_files(path / name) for name in names}))
    files = _saved_files(path)
    return Directory(path=path, files=files) if files else None


def _saved_files(path: Path) -> tuple[Path, ...]:
    """Return the files of one data set that `save_to_disk` wrote; none if it wrote none there."""
    found = _metadata(path / SAVED_STATE).get("_data_files")
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        return ()
    return tuple(path / name for name in _names([each.get("filename") for each in found]))


def _names(values: object) -> list[str]:
    """Return the last parts of paths, each the name of something in a directory; none at all if one is none."""
    if not isinstance(values, list):
        return []
    names = [Path(value).name if may_be_path(value) else "" for value in values]
    return names if all(name not in ("", "..") for name in names) else []


def _cached(path: Path, entries: Iterable[Path]) -> Directory | None:
    """Return what is in a directory of the cache of `datasets`: NAME-SPLIT.arrow, or shards of it."""
    splits = _metadata(path / BUILDER_INFO).get("splits")
    if not isinstance(splits, dict):
        return None
    files = {str(split): [entry for entry in entries if is_data(entry) and _is_of(entry, split)] for split in splits}
    return Directory(path=path, splits=_splits(files)) if any(files.values()) else None


def _is_of(path: Path, split: str) -> bool:
    shard = shard_of(path.name)
    return (shard.prefix if shard else path.name.partition(".")[0]).endswith(f"-{split}")


def _metadata(path: Path) -> Mapping[str, Any]:
    """Return the object in a file of JSON that libraries write; nothing if there is none, or it is something else."""
    try:
        with open_regular(path) as file:
            content = file.read(MOST_METADATA_BYTES + 1)
        found = json.loads(content) if len(content) <= MOST_METADATA_BYTES else {}
    except (OSError, ValueError, RecursionError):  # a file of the user's that is only called so
        return {}
    return found if isinstance(found, dict) else {}


def _by_names(path: Path, entries: Sequence[Path]) -> Directory | None:
    """Return the files in a directory, and in folders that are called as splits, by what their names tell."""
    files = [entry for entry in entries if is_data(entry)]
    folders = [entry for entry in entries if words_in(entry.name) and entry.is_dir()]
    data = path / DATA_FOLDER
    if not folders and data in entries and not any(words_in(file.name) for file in files):
        inside = _by_names(data, _shown(data))
        if inside and (inside.has_splits or not files):
            return replace(inside, others=(*files, *inside.others))
    in_folders = [file for folder in folders for below in directories_below(folder) for file in _data_in(below)]
    files = sorted({*files, *in_folders})
    return _sorted(path, files) if files else None


def _shown(path: Path) -> list[Path]:
    try:
        return sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}", hint="Check its permissions.") from error


def _data_in(path: Path) -> list[Path]:
    return [entry for entry in _shown(path) if is_data(entry)]


def _sorted(path: Path, files: Sequence[Path]) -> Directory:
    others = [file for file in files if file.name.partition(".")[0] == ABOUT_OTHERS]
    if len(others) == len(files):
        others = []
    told = {file: splits_told(file.relative_to(path)) for file in files if file not in others}
    if not any(told.values()):
        return Directory(path=path, files=tuple(told), others=tuple(others))
    splits: dict[str, list[Path]] = {}
    rest = []
    for file, names in told.items():
        prefix = split_of_prefix(file.relative_to(path))
        if len(names) == 1 or (not names and prefix):
            splits.setdefault(next(iter(names), prefix or ""), []).append(file)
        elif not names:
            rest.append(file)
    if not named(splits, TRAIN) and rest:
        splits[TRAIN], rest = rest, []
    unclear = tuple(file for file, names in told.items() if len(names) > 1)
    return Directory(path=path, splits=_splits(splits), unclear=unclear, others=tuple(others + rest))


def _of_folders(path: Path, entries: Sequence[Path]) -> Directory:
    """Return what is in the only folder with data, if that has splits: the cache of `datasets` has some in each other.

    Raises:
        DataError: it has none, or there is no such folder, or several.
    """
    folders = [entry for entry in entries if entry.is_dir() and _holds_data(entry)]
    if len(folders) == 1 and (found := look_into(folders[0])).has_splits:
        return found
    named = [each for folder in folders for each in _nearest(folder)]
    first = ", ".join(map(printable, named[:MOST_NAMED]))
    more = f", and {len(named) - MOST_NAMED:,} more" if len(named) > MOST_NAMED else ""
    raise DataError(
        f"{path} holds no data: no {kinds()} file",
        hint=f"Folders below do; give one: {first}{more}" if named else "Check the path.",
    )


def _holds_data(path: Path) -> bool:
    """Whether a directory that was not left half-written, or one below it, holds data."""
    return path.suffix != HALF_WRITTEN and any(map(_data_in, islice(directories_below(path), MOST_DIRECTORIES)))


def _nearest(path: Path) -> Iterator[Path]:
    """Yield the directory itself if it can be read, or those below that can."""
    entries = _shown(path)
    if _saved(path) or _cached(path, entries) or _by_names(path, entries):
        yield path
        return
    for folder in entries:
        if folder.is_dir() and _holds_data(folder):
            yield from _nearest(folder)
