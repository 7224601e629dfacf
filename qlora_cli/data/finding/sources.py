"""Find a data set by its name: local files, or a hub id. Imports nothing heavy, because names are checked first.

A name is `PATH[#ROWS][*WEIGHT]` for a file or a glob, `PATH[:CONFIG[:SPLIT]][#ROWS][*WEIGHT]` for a directory, or
`[OWNER/]NAME[@REVISION][:CONFIG[:SPLIT]][#ROWS][*WEIGHT]` for a data set on the hub.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fractions import Fraction
from glob import has_magic
from pathlib import Path

from qlora_cli.data.finding.directories import DataDirectory, scan_directory
from qlora_cli.data.finding.file_types import checked_file, is_data_file, printable, suffixes_of, supported_suffixes
from qlora_cli.data.finding.globs import expand_glob
from qlora_cli.data.finding.split_names import TRAIN
from qlora_cli.errors import DataError, DatasetNotFoundError, QloraError
from qlora_cli.files import existing_path

MAX_WEIGHT = 1000
MAX_HUB_ID_LENGTH = 96
NO_SPLITS = "it has no splits: no file or folder is named after one"
CHECK_PATTERN = "Check the pattern; ** searches directories below, as in data/**/*.jsonl."

SAMPLE = re.compile(r"(?s)(?P<base>.+)#(?P<value>[^#*/]*)")
# A weight has to look like a number: `*` is also part of globs.
WEIGHT = re.compile(r"(?s)(?P<base>.+)\*(?P<value>[-+]?[0-9.]*[0-9][0-9.]*)")
HUB_NAME = re.compile(
    r"(?P<repository>(?:[\w-][\w.-]*/)?[\w-][\w.-]*)"
    r"(?:@(?P<revision>[^:\s*?\[]+))?(?::(?P<config>[^:/]*)(?::(?P<split>.+))?)?",
    re.ASCII,
)
DIRECTORY_NAME = re.compile(r"(?s)(?P<base>.+?):(?P<config>[^:/]*)(?::(?P<split>[^:/]+))?")


@dataclass(frozen=True, kw_only=True)
class DatasetSource:
    """A data set: either local `files`, sorted, or a `repository` on the hub.

    Attributes:
        name: As the user gave it, including config, split, sample and weight.
        directory: The scanned directory that `files` come from, if the name is that of a directory.
        split: The split in the name of a hub data set, or the split of a directory that `files` belong to.
        num_rows: The size of the random sample to draw; None for all rows.
        weight: How often each row is repeated.
    """

    name: str
    files: tuple[Path, ...] = ()
    directory: DataDirectory | None = None
    repository: str | None = None
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    num_rows: int | None = None
    weight: Fraction = Fraction(1)

    @property
    def is_local(self) -> bool:
        """Whether the data is on this disk."""
        return bool(self.files)

    @property
    def has_splits(self) -> bool:
        """Whether the data set has splits that can be selected."""
        return not self.is_local or self.split is not None


@dataclass(frozen=True)
class _ParsedName:
    """One way to split a name into a path or repository, `base`, and the parts that follow it."""

    base: str
    sample: str | None = None
    weight: str | None = None
    config: str | None = None
    split: str | None = None

    @property
    def has_config(self) -> bool:
        """Whether the name has a config, which may be empty, or a split."""
        return self.config is not None


def find_dataset(name: str, split: str = TRAIN) -> DatasetSource:
    """Return the source of the data set `name`; of a directory with splits, the one in the name, or else `split`.

    Raises:
        DatasetNotFoundError: no such file or directory, and it can't be a hub id.
        DataError: a file is empty or of an unsupported type, a directory or glob has no data files, the sample or
            weight is not a number in range, or the split or config does not exist.
    """
    parsed, location = _locate(name)
    return _find_on_hub(name, parsed) if location is None else _local(name, parsed, location, parsed.split or split)


def find_split(name: str, split: str) -> DatasetSource:
    """Return the whole split `split` of the data set `name`, ignoring a sample or split in the name.

    Raises:
        DatasetNotFoundError: as `find_dataset`.
        DataError: as `find_dataset`; or the data set has no splits.
    """
    parsed, location = _locate(name)
    parsed = replace(parsed, sample=None)
    if location is None:
        return replace(_find_on_hub(name, parsed), split=split)
    source = _local(name, parsed, location, split)
    if source.split is None:
        raise DataError(f"{name}: {NO_SPLITS}", hint="Hold out a share such as 5%, or name a file of its own.")
    return source


def first_local(names: Iterable[str]) -> str | None:
    """Return the first of the names that refers to data on this disk; None if none does."""
    for name in names:
        parsed, location = _locate(name)
        try:
            if location is not None and _resolve(name, parsed, location):
                return name
        except QloraError:
            continue
    return None


def check_dataset_name(name: str, split: str = TRAIN) -> QloraError | None:
    """Return the error in a data set's name, as far as it shows without asking the hub; None if there is none."""
    if name == "-":
        return DataError("rows are not read from stdin: they are read more than once", hint="Save them to a file.")
    try:
        find_dataset(name, split)
    except QloraError as error:
        return error
    return None


def _parses(name: str) -> Iterator[_ParsedName]:
    """Yield the ways to split `name`, the one with the longest path first."""
    yield _ParsedName(name)
    base, weight = name, None
    if match := WEIGHT.fullmatch(name):
        base, weight = match["base"], match["value"]
        yield _ParsedName(base, weight=weight)
    if match := SAMPLE.fullmatch(base):
        yield _ParsedName(match["base"], match["value"], weight)


def _with_config_and_split(parses: Iterable[_ParsedName]) -> Iterator[_ParsedName]:
    """Yield the parses whose base may end in a config and a split of a directory, with these split off."""
    for parsed in parses:
        if match := DIRECTORY_NAME.fullmatch(parsed.base):
            yield replace(parsed, base=match["base"], config=match["config"], split=match["split"])


def _locate(name: str) -> tuple[_ParsedName, Path | list[Path] | None]:
    """Return the parsed `name`, and its path or the matches of its glob; None if only the hub may have it."""
    parses = list(_parses(name))
    for parsed in [*parses, *_with_config_and_split(reversed(parses))]:
        if (path := existing_path(parsed.base)) is not None:
            return parsed, path
    for parsed in parses:
        if paths := expand_glob(parsed.base):
            return parsed, paths
    return parses[-1], None


def _local(name: str, parsed: _ParsedName, location: Path | list[Path], split: str) -> DatasetSource:
    contents = _resolve(name, parsed, location)
    files, used_split = _select_files(contents, parsed, split)
    return DatasetSource(
        name=name,
        files=tuple(map(checked_file, files)),
        directory=contents if isinstance(contents, DataDirectory) else None,
        split=used_split,
        num_rows=_num_rows(name, parsed.sample),
        weight=_weight(name, parsed.weight),
    )


def _select_files(
    contents: DataDirectory | list[Path], parsed: _ParsedName, split: str
) -> tuple[Iterable[Path], str | None]:
    """Return the files to read, and their split if the directory has splits."""
    if isinstance(contents, list):
        return contents, None
    if contents.has_splits:
        used = contents.split(split, parsed.base)
        return used.files, used.name
    if parsed.split:
        raise DataError(
            f"{parsed.base} has no splits: no file or folder in it is named after one", hint=f"Write {parsed.base}"
        )
    return contents.files, None


def _resolve(name: str, parsed: _ParsedName, location: Path | list[Path]) -> DataDirectory | list[Path]:
    if isinstance(location, list):
        return _data_files_among(location, parsed.base)
    if location.is_dir():
        return scan_directory(location, parsed.config or None, parsed.base)
    if parsed.has_config:
        raise DataError(f"{name}: {parsed.base} is one file, without splits", hint=f"Write {parsed.base}")
    return [_check_is_file(location)]


def _num_rows(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"0*[1-9][0-9]{0,17}", text):
        raise DataError(
            f"{name}: '#{text}' is not a number of rows", hint="For a sample of 500 rows write #500; there is no #0."
        )
    return int(text)


def _weight(name: str, text: str | None) -> Fraction:
    if text is None:
        return Fraction(1)
    is_number = re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?|\.[0-9]{1,9}", text)
    weight = Fraction(text) if is_number else Fraction(0)
    if not 0 < weight <= MAX_WEIGHT:
        raise DataError(
            f"{name}: '*{text}' is not a weight",
            hint=f"Write *2 to take each row twice, *0.5 to take half of them; more than 0, at most {MAX_WEIGHT}.",
        )
    return weight


def _check_is_file(path: Path) -> Path:
    """Return `path`, which exists, if it is a regular file."""
    if not path.is_file():
        raise DataError(f"{path} is neither a file nor a directory", hint=f"Use a {supported_suffixes()} file.")
    return path


def _data_files_among(paths: list[Path], pattern: str) -> list[Path]:
    if files := [path for path in paths if is_data_file(path)]:
        return files
    raise DataError(
        f"{pattern} matches no data: {len(paths)} matches ({printable(paths[0])} for one), "
        f"but no {supported_suffixes()} file",
        hint=CHECK_PATTERN,
    )


def _find_on_hub(name: str, parsed: _ParsedName) -> DatasetSource:
    match = HUB_NAME.fullmatch(parsed.base)
    if match is None or not _may_be_repository(match["repository"]):
        raise _not_found(name, parsed.base)
    return DatasetSource(
        name=name,
        repository=match["repository"],
        revision=match["revision"],
        config=match["config"] or None,
        split=match["split"],
        num_rows=_num_rows(name, parsed.sample),
        weight=_weight(name, parsed.weight),
    )


def _may_be_repository(repository: str) -> bool:
    is_id = len(repository) <= MAX_HUB_ID_LENGTH and "--" not in repository and ".." not in repository
    return is_id and suffixes_of(Path(repository)) is None


def _not_found(name: str, base: str) -> DatasetNotFoundError:
    hint = "Check the path."
    if swapped := re.fullmatch(r"(?s)(.+)(\*[0-9.]+)(#[0-9]+)", name):
        hint = f"The number of rows comes before the weight: {swapped[1]}{swapped[3]}{swapped[2]}"
    elif has_magic(base):
        return DatasetNotFoundError(f"no file matches {base}", hint=CHECK_PATTERN)
    elif similar := similar_local_name(base):
        hint = f"Did you mean {similar}?"
    return DatasetNotFoundError(f"no data set at {name}: no such file", hint=hint)


def similar_local_name(base: str) -> str | None:
    """Return the existing data file or directory whose name is most like that of `base`, which does not exist."""
    path = Path(base)
    try:
        siblings = [
            entry.name for entry in path.expanduser().parent.iterdir() if is_data_file(entry) or entry.is_dir()
        ]
    except (OSError, ValueError, RuntimeError):  # no such directory either
        return None
    stems = {name.partition(".")[0]: name for name in sorted(siblings, reverse=True)}
    stem = path.name.partition(".")[0]
    near = [stem] if stem in stems else get_close_matches(stem, stems, n=1)
    return printable(path.with_name(stems[near[0]])) if near else None
