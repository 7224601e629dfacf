"""Find a data set by its name: local files, or a hub id. Imports nothing heavy: names are checked before a run begins.

A name is `PATH[#ROWS][*WEIGHT]`, of a file or a glob, `PATH[:CONFIG[:SPLIT]][#ROWS][*WEIGHT]`, of a directory, or
`[OWNER/]NAME[@REVISION][:CONFIG[:SPLIT]][#ROWS][*WEIGHT]`, of a data set on the hub.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fractions import Fraction
from glob import has_magic
from pathlib import Path

from qlora_cli.data.finding.directories import Directory, look_into
from qlora_cli.data.finding.file_types import checked, is_data, kinds, printable, suffixes_of
from qlora_cli.data.finding.globs import matches
from qlora_cli.data.finding.split_names import TRAIN
from qlora_cli.errors import DataError, DatasetNotFoundError, QloraError
from qlora_cli.files import existing_path

MOST_WEIGHT = 1000
LONGEST_HUB_ID = 96
NO_SPLITS = "nothing tells of splits in it, as the names of files in a directory may"
CHECK_PATTERN = "Check the pattern; ** searches directories below, as in data/**/*.jsonl."

SAMPLE = re.compile(r"(?s)(?P<base>.+)#(?P<value>[^#*/]*)")
# A weight has to look like a number: `*` is also part of globs.
WEIGHT = re.compile(r"(?s)(?P<base>.+)\*(?P<value>[-+]?[0-9.]*[0-9][0-9.]*)")
HUB_NAME = re.compile(
    r"(?P<repository>(?:[\w-][\w.-]*/)?[\w-][\w.-]*)"
    r"(?:@(?P<revision>[^:\s*?\[]+))?(?::(?P<config>[^:/]*)(?::(?P<split>.+))?)?",
    re.ASCII,
)
PART_OF_DIRECTORY = re.compile(r"(?s)(?P<base>.+?):(?P<config>[^:/]*)(?::(?P<split>[^:/]+))?")


@dataclass(frozen=True, kw_only=True)
class DatasetSource:
    """Either local `files`, sorted, or a `repository` of the hub.

    Attributes:
        name: As the user gave it, with everything behind it.
        directory: What the directory holds that `files` are of, if they are of one.
        split: Of the hub data set, if the name has one; of a directory, that of `files`, if it has any.
        num_rows: The size of the sample that is drawn from the rows; all of them if None.
        weight: How many times each row is taken.
    """

    name: str
    files: tuple[Path, ...] = ()
    directory: Directory | None = None
    repository: str | None = None
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    num_rows: int | None = None
    weight: Fraction = Fraction(1)

    @property
    def is_local(self) -> bool:
        """Whether the rows lie on this disk."""
        return bool(self.files)

    @property
    def has_splits(self) -> bool:
        """Whether it is of one split of several that may be named."""
        return not self.is_local or self.split is not None


@dataclass(frozen=True)
class _Reading:
    """One way to read a name: what is found by `base`, and what stood behind it."""

    base: str
    sample: str | None = None
    weight: str | None = None
    config: str | None = None
    split: str | None = None

    @property
    def takes_part(self) -> bool:
        """Whether a config or a split stood there."""
        return self.config is not None


def find_dataset(name: str, split: str = TRAIN) -> DatasetSource:
    """Return where the data set `name` is: of a directory with splits the one that it names, or else `split`.

    Raises:
        DatasetNotFoundError: no such file or directory, and it can't be a hub id.
        DataError: a file of a kind that is not read, an empty one, a directory or a glob without any, a
            sample or weight that is none, or a split or config that is not there.
    """
    reading, found = _locate(name)
    return _find_on_hub(name, reading) if found is None else _local(name, reading, found, reading.split or split)


def find_split(name: str, split: str) -> DatasetSource:
    """Return all of the split `split` of the data set that `name` is of, whichever rows of it the name takes.

    Raises:
        DatasetNotFoundError: as `find_dataset`.
        DataError: as `find_dataset`; or it has no splits.
    """
    reading, found = _locate(name)
    reading = replace(reading, sample=None)
    if found is None:
        return replace(_find_on_hub(name, reading), split=split)
    source = _local(name, reading, found, split)
    if source.split is None:
        raise DataError(f"{name}: {NO_SPLITS}", hint="Hold out a share such as 5%, or name a file of its own.")
    return source


def first_local(names: Iterable[str]) -> str | None:
    """Return the first of the names of data sets that is of something on this disk; None if none is."""
    for name in names:
        reading, found = _locate(name)
        try:
            if found is not None and _contents(name, reading, found):
                return name
        except QloraError:
            continue
    return None


def check_dataset_name(name: str, split: str = TRAIN) -> QloraError | None:
    """Return what is wrong with a data set's name, as far as this machine can tell at once."""
    try:
        find_dataset(name, split)
    except QloraError as error:
        return error
    return None


def _readings(name: str) -> Iterator[_Reading]:
    """Yield the ways to read `name`, that which takes most of it for a path first."""
    yield _Reading(name)
    base, weight = name, None
    if found := WEIGHT.fullmatch(name):
        base, weight = found["base"], found["value"]
        yield _Reading(base, weight=weight)
    if found := SAMPLE.fullmatch(base):
        yield _Reading(found["base"], found["value"], weight)


def _in_parts(readings: Iterable[_Reading]) -> Iterator[_Reading]:
    """Yield the readings whose end may be a config and a split of a directory, with these taken off."""
    for reading in readings:
        if found := PART_OF_DIRECTORY.fullmatch(reading.base):
            yield replace(reading, base=found["base"], config=found["config"], split=found["split"])


def _locate(name: str) -> tuple[_Reading, Path | list[Path] | None]:
    """Return how to read `name`, and what is there: a path, what a glob finds, or None: only the hub may have it."""
    readings = list(_readings(name))
    for reading in [*readings, *_in_parts(reversed(readings))]:
        if (path := existing_path(reading.base)) is not None:
            return reading, path
    for reading in readings:
        if found := matches(reading.base):
            return reading, found
    return readings[-1], None


def _local(name: str, reading: _Reading, found: Path | list[Path], split: str) -> DatasetSource:
    holds = _contents(name, reading, found)
    files, chosen = _files_of(holds, reading, split)
    return DatasetSource(
        name=name,
        files=tuple(map(checked, files)),
        directory=holds if isinstance(holds, Directory) else None,
        split=chosen,
        num_rows=_num_rows(name, reading.sample),
        weight=_weight(name, reading.weight),
    )


def _files_of(holds: Directory | list[Path], reading: _Reading, split: str) -> tuple[Iterable[Path], str | None]:
    """Return the files to read of what is there, and the split that they are, if it has any."""
    if isinstance(holds, list):
        return holds, None
    if holds.has_splits:
        chosen = holds.split(split, reading.base)
        return chosen.files, chosen.name
    if reading.split:
        raise DataError(f"{reading.base} has no splits: no name in it tells of any", hint=f"Write {reading.base}")
    return holds.files, None


def _contents(name: str, reading: _Reading, found: Path | list[Path]) -> Directory | list[Path]:
    if isinstance(found, list):
        return _find_among(found, reading.base)
    if found.is_dir():
        return look_into(found, reading.config or None, reading.base)
    if reading.takes_part:
        raise DataError(f"{name}: {reading.base} is one file, without splits", hint=f"Write {reading.base}")
    return [_find_at(found)]


def _num_rows(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"0*[1-9][0-9]{0,17}", text):
        raise DataError(
            f"{name}: '#{text}' is no number of rows", hint="For a sample of 500 rows write #500; there is no #0."
        )
    return int(text)


def _weight(name: str, text: str | None) -> Fraction:
    if text is None:
        return Fraction(1)
    is_number = re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?|\.[0-9]{1,9}", text)
    weight = Fraction(text) if is_number else Fraction(0)
    if not 0 < weight <= MOST_WEIGHT:
        raise DataError(
            f"{name}: '*{text}' is no weight",
            hint=f"Write *2 to take each row twice, *0.5 to take half of them; more than 0, at most {MOST_WEIGHT}.",
        )
    return weight


def _find_at(path: Path) -> Path:
    """Return `path`, which exists, if it is a file."""
    if not path.is_file():
        raise DataError(f"{path} is neither a file nor a directory", hint=f"Use a {kinds()} file.")
    return path


def _find_among(found: list[Path], pattern: str) -> list[Path]:
    if files := [path for path in found if is_data(path)]:
        return files
    raise DataError(
        f"{pattern} matches no data: {len(found)} found ({printable(found[0])} for one), but no {kinds()} file",
        hint=CHECK_PATTERN,
    )


def _find_on_hub(name: str, reading: _Reading) -> DatasetSource:
    found = HUB_NAME.fullmatch(reading.base)
    if found is None or not _may_be_repository(found["repository"]):
        raise _nothing_at(name, reading.base)
    return DatasetSource(
        name=name,
        repository=found["repository"],
        revision=found["revision"],
        config=found["config"] or None,
        split=found["split"],
        num_rows=_num_rows(name, reading.sample),
        weight=_weight(name, reading.weight),
    )


def _may_be_repository(repository: str) -> bool:
    is_id = len(repository) <= LONGEST_HUB_ID and "--" not in repository and ".." not in repository
    return is_id and suffixes_of(Path(repository)) is None


def _nothing_at(name: str, base: str) -> DatasetNotFoundError:
    hint = "Check the path."
    if turned := re.fullmatch(r"(?s)(.+)(\*[0-9.]+)(#[0-9]+)", name):
        hint = f"The number of rows comes before the weight: {turned[1]}{turned[3]}{turned[2]}"
    elif has_magic(base):
        return DatasetNotFoundError(f"no file matches {base}", hint=CHECK_PATTERN)
    elif near := called_alike(base):
        hint = f"Did you mean {near}?"
    return DatasetNotFoundError(f"no data set at {name}: no such file", hint=hint)


def called_alike(base: str) -> str | None:
    """Return the file of rows or directory beside `base`, which is not there, that is called most like it."""
    path = Path(base)
    try:
        beside = [each.name for each in path.expanduser().parent.iterdir() if is_data(each) or each.is_dir()]
    except (OSError, ValueError, RuntimeError):  # no such directory either
        return None
    stems = {name.partition(".")[0]: name for name in sorted(beside, reverse=True)}
    stem = path.name.partition(".")[0]
    near = [stem] if stem in stems else get_close_matches(stem, stems, n=1)
    return printable(path.with_name(stems[near[0]])) if near else None
