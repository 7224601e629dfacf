"""Which files hold rows: by their names, and by what shows in their first bytes that they do not."""

import os
import re
from pathlib import Path
from typing import TypeGuard

from qlora_cli.errors import DataError
from qlora_cli.files import open_regular

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
READ_FROM_ANY_PLACE = (".parquet", ".arrow")
# What libraries write about data into its directory.
METADATA = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"))
# What `map` of `datasets` leaves where it read: a result and no data. With a name of the user's own only beside these.
MAP_CACHE = re.compile(r"cache-[0-9a-f]{16}(_[0-9]{5}_of_[0-9]{5})?\.arrow")
NAMED_CACHE, BESIDE_CACHES = re.compile(r"cache-.*\.arrow"), ("state.json", "dataset_info.json")
LONGEST_PATH, LONGEST_PART = 4000, 255  # bytes, of which Linux takes a few more behind a directory's own path
POINTER, LONGEST_POINTER = b"version https://git-lfs.github.com/spec/", 1024


def kinds() -> str:
    """Return the suffixes of files that are read, for a message."""
    return ", ".join(SUFFIXES)


def printable(path: Path) -> str:
    """Return `path` as text that can be written anywhere: bytes in it that are no UTF-8 become `\ufffd`."""
    return os.fsencode(path).decode("utf-8", "replace")


def may_be_path(text: object) -> TypeGuard[str]:
    """Whether a value in a file of others can be the name of a file, or a path to one: a text that systems take."""
    if not isinstance(text, str) or "\0" in text:
        return False
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:  # half a character
        return False
    return len(encoded) <= LONGEST_PATH and all(len(part) <= LONGEST_PART for part in encoded.split(b"/"))


def suffixes_of(path: Path) -> tuple[str, str | None] | None:
    """Return the kind of a file and its compression, as `(".jsonl", ".gz")`; None if it is of no kind that is read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in SUFFIXES:
        return suffixes[-1], None
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSIONS and suffixes[-2] in SUFFIXES:
        return suffixes[-2], suffixes[-1]
    return None


def is_data(path: Path) -> bool:
    """Whether `path`, which nobody named, is a file of rows."""
    is_cache = MAP_CACHE.fullmatch(path.name) or (
        NAMED_CACHE.fullmatch(path.name) and any((path.parent / name).is_file() for name in BESIDE_CACHES)
    )
    return path.name not in METADATA and not is_cache and suffixes_of(path) is not None and path.is_file()


def checked(path: Path) -> Path:
    """Return `path` if it can hold rows.

    Raises:
        DataError: it is of a kind that is not read, or not when compressed; or empty, gone, or a pointer of Git LFS.
    """
    if (found := suffixes_of(path)) is None:
        raise DataError(f"{printable(path)} is of a kind that is not read", hint=f"Use a {kinds()} file.")
    suffix, compression = found
    if suffix in READ_FROM_ANY_PLACE and compression:
        raise DataError(
            f"{printable(path)}: a {suffix} file that is compressed as a whole is not read",
            hint=f"Take the {compression} off it first.",
        )
    try:
        num_bytes = path.stat().st_size
        with open_regular(path) as file:
            is_pointer = num_bytes <= LONGEST_POINTER and file.read(len(POINTER)) == POINTER
    except OSError as error:
        raise DataError(f"{printable(path)} can't be read: {error.strerror}", hint="Is it still there?") from error
    if num_bytes == 0:
        raise DataError(f"{printable(path)} is empty", hint="Give a file with at least one row.")
    if is_pointer:
        raise DataError(
            f"{printable(path)} is no data: it is a pointer of Git LFS to the file, which was not downloaded",
            hint="In its repository run: git lfs install && git lfs pull",
        )
    return path
