"""Find a data set by its name: local files, or a hub id. Imports nothing heavy: names are checked before a run begins.

A name is `PATH[#ROWS][*WEIGHT]`, of a file, a directory or a glob, or
`[OWNER/]NAME[@REVISION][:CONFIG[:SPLIT]][#ROWS][*WEIGHT]`, of a data set on the hub.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from glob import escape, glob, has_magic
from itertools import dropwhile
from pathlib import Path

from qlora_cli.errors import DataError, DatasetNotFoundError, QloraError
from qlora_cli.files import existing_path

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
READ_FROM_ANY_PLACE = (".parquet", ".arrow")
# What `save_to_disk` writes about the data beside it; and what `map` leaves there, a result and no data.
METADATA = ("dataset_info.json", "state.json", "dataset_dict.json")
MAP_CACHE = re.compile(r"cache-.*\.arrow")
MOST_WEIGHT = 1000
ANY_DEPTH = "**"
LONGEST_HUB_ID = 96
CHECK_PATTERN = "Check the pattern; ** searches directories below, as in data/**/*.jsonl."

SAMPLE = re.compile(r"(?s)(?P<base>.+)#(?P<value>[^#*/]*)")
# A weight has to look like a number: `*` is also part of globs.
WEIGHT = re.compile(r"(?s)(?P<base>.+)\*(?P<value>[-+]?[0-9.]*[0-9][0-9.]*)")
HUB_NAME = re.compile(
    r"(?P<repository>(?:[\w-][\w.-]*/)?[\w-][\w.-]*)"
    r"(?:@(?P<revision>[^:\s*?\[]+))?(?::(?P<config>[^:/]*)(?::(?P<split>.+))?)?",
    re.ASCII,
)


@dataclass(frozen=True, kw_only=True)
class DatasetSource:
    """Either local `files`, sorted, or a `repository` of the hub.

    Attributes:
        name: As the user gave it, with everything behind it.
        split: Of the hub data set, if the name has one.
        num_rows: The size of the sample that is drawn from the rows; all of them if None.
        weight: How many times each row is taken.
    """

    name: str
    files: tuple[Path, ...] = ()
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


@dataclass(frozen=True)
class _Reading:
    """One way to read a name: what is found by `base`, and what stood behind it."""

    base: str
    sample: str | None = None
    weight: str | None = None


def find_dataset(name: str) -> DatasetSource:
    """Return where the data set `name` is.

    Raises:
        DatasetNotFoundError: no such file or directory, and it can't be a hub id.
        DataError: a file of a kind that is not read, an empty one, a directory or a glob without any, or a
            sample or weight that is none.
    """
    readings = list(_readings(name))
    for reading in readings:
        if (path := existing_path(reading.base)) is not None:
            return _local(name, reading, _find_at(path))
    for reading in readings:
        if matches := _matches(reading.base):
            return _local(name, reading, _find_among(matches, reading.base))
    return _find_on_hub(name, readings[-1])


def first_local(names: Iterable[str]) -> str | None:
    """Return the first of the names of data sets that is of something on this disk; None if none is."""
    for name in names:
        try:
            if find_dataset(name).is_local:
                return name
        except QloraError:
            continue
    return None


def check_dataset_name(name: str) -> QloraError | None:
    """Return what is wrong with a data set's name, as far as this machine can tell at once."""
    try:
        find_dataset(name)
    except QloraError as error:
        return error
    return None


def printable(path: Path) -> str:
    """Return `path` as text that can be written anywhere: bytes in it that are no UTF-8 become `\ufffd`."""
    return os.fsencode(path).decode("utf-8", "replace")


def suffixes_of(path: Path) -> tuple[str, str | None] | None:
    """Return the kind of a file and its compression, as `(".jsonl", ".gz")`; None if it is of no kind that is read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in SUFFIXES:
        return suffixes[-1], None
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSIONS and suffixes[-2] in SUFFIXES:
        return suffixes[-2], suffixes[-1]
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


def _local(name: str, reading: _Reading, files: Iterable[Path]) -> DatasetSource:
    num_rows, weight = _num_rows(name, reading.sample), _weight(name, reading.weight)
    return DatasetSource(name=name, files=tuple(map(_checked, files)), num_rows=num_rows, weight=weight)


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


def _find_at(path: Path) -> list[Path]:
    """Return the files at `path`, which exists."""
    if path.is_dir():
        return _find_in_directory(path)
    if not path.is_file():
        raise DataError(f"{path} is neither a file nor a directory", hint=f"Use a {_kinds()} file.")
    if suffixes_of(path) is None:
        raise DataError(f"{path} is of a kind that is not read", hint=f"Use a {_kinds()} file.")
    return [path]


def _find_in_directory(directory: Path) -> list[Path]:
    try:
        entries = list(directory.iterdir())
    except OSError as error:
        raise DataError(f"{directory} can't be read: {error.strerror}", hint="Check its permissions.") from error
    if files := sorted(path for path in entries if not path.name.startswith(".") and _is_data(path)):
        return files
    folders = sorted(path.name for path in entries if path.is_dir() and not path.name.startswith("."))
    raise DataError(
        f"{directory} holds no data: no {_kinds()} file",
        hint=f"Give one of its folders, {printable(directory / folders[0])} for one."
        if folders
        else "Check the path.",
    )


def _matches(pattern: str) -> list[Path]:
    """Return everything that `pattern` finds, sorted; nothing if it is no glob."""
    if not has_magic(pattern):
        return []
    try:
        found = _expand(str(Path(pattern).expanduser()))
    except (OSError, ValueError, RuntimeError):  # a NUL byte, a home directory of nobody
        return []
    return sorted(set(map(Path, found)))


def _expand(pattern: str) -> list[str]:
    """Return what `pattern` finds; `**` goes into each directory below once, however many links lead to it."""
    parts = Path(pattern).parts
    if ANY_DEPTH not in parts:
        # `Path.glob` takes no absolute pattern, and finds hidden files.
        return glob(pattern)  # noqa: PTH207
    place = parts.index(ANY_DEPTH)
    behind = [*dropwhile(lambda part: part == ANY_DEPTH, parts[place:])] or ["*"]
    tops = glob(str(Path(*parts[:place]))) if place else ["."]  # noqa: PTH207
    directories = [escape(directory) for top in tops for directory in _directories(top)]
    return [found for directory in directories for found in _expand(str(Path(directory, *behind)))]


def _directories(top: str) -> Iterator[str]:
    """Yield `top` and the directories below that are not hidden, each once; one itself comes before links to it."""
    seen = set()
    for directory, names, _ in os.walk(top, followlinks=True):
        stat = Path(directory).stat()
        if (stat.st_dev, stat.st_ino) in seen:
            names.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        shown = [name for name in names if not name.startswith(".")]
        names[:] = sorted(shown, key=lambda name: (Path(directory, name).is_symlink(), name))
        yield directory


def _find_among(matches: list[Path], pattern: str) -> list[Path]:
    if files := [path for path in matches if _is_data(path)]:
        return files
    raise DataError(
        f"{pattern} matches no data: {len(matches)} found ({printable(matches[0])} for one), but no {_kinds()} file",
        hint=CHECK_PATTERN,
    )


def _is_data(path: Path) -> bool:
    """Whether `path`, which nobody named, is a file of rows."""
    if path.name in METADATA or (MAP_CACHE.fullmatch(path.name) and (path.parent / "state.json").is_file()):
        return False
    return suffixes_of(path) is not None and path.is_file()


def _checked(path: Path) -> Path:
    """Return `path` if it can hold rows.

    Raises:
        DataError: it is empty, gone, or of a kind that is not read when compressed.
    """
    suffix, compression = suffixes_of(path) or ("", None)
    if suffix in READ_FROM_ANY_PLACE and compression:
        raise DataError(
            f"{printable(path)}: a {suffix} file that is compressed as a whole is not read",
            hint=f"Take the {compression} off it first.",
        )
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise DataError(f"{printable(path)} can't be read: {error.strerror}", hint="Is it still there?") from error
    if num_bytes == 0:
        raise DataError(f"{printable(path)} is empty", hint="Give a file with at least one row.")
    return path


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
    return DatasetNotFoundError(f"no data set at {name}: no such file", hint=hint)


def _kinds() -> str:
    return ", ".join(SUFFIXES)
