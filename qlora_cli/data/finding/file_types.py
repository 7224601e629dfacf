"""Recognise data files by their names, and reject files whose first bytes show that they hold no rows."""

import os
import re
from pathlib import Path
from typing import TypeGuard

from qlora_cli.errors import DataError
from qlora_cli.files import open_regular

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
NEEDS_SEEKING = (".parquet", ".arrow")
# Metadata that libraries write into the directory of the data.
METADATA = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"))
# Cached results of `Dataset.map`. A file named by the user counts as one only next to the metadata of `datasets`.
MAP_CACHE = re.compile(r"cache-[0-9a-f]{16}(_[0-9]{5}_of_[0-9]{5})?\.arrow")
NAMED_CACHE, CACHE_METADATA = re.compile(r"cache-.*\.arrow"), ("state.json", "dataset_info.json")
MAX_PATH_BYTES, MAX_NAME_BYTES = 4000, 255  # Linux allows a few more bytes, but the directory's own path comes first
POINTER, MAX_POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024


def supported_suffixes() -> str:
    """Return the suffixes of supported files, for a message."""
    return ", ".join(SUFFIXES)


def printable(path: Path) -> str:
    """Return `path` as valid Unicode: bytes in it that are not UTF-8 become `\ufffd`."""
    return os.fsencode(path).decode("utf-8", "replace")


def may_be_path(text: object) -> TypeGuard[str]:
    """Return whether an untrusted value is text that the system accepts as a path."""
    if not isinstance(text, str) or "\0" in text:
        return False
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return len(encoded) <= MAX_PATH_BYTES and all(len(part) <= MAX_NAME_BYTES for part in encoded.split(b"/"))


def suffixes_of(path: Path) -> tuple[str, str | None] | None:
    """Return the type and compression of a file, such as `(".jsonl", ".gz")`; None if its type is not supported."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in SUFFIXES:
        return suffixes[-1], None
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSIONS and suffixes[-2] in SUFFIXES:
        return suffixes[-2], suffixes[-1]
    return None


def is_data_file(path: Path) -> bool:
    """Return whether `path`, which was found in a directory and not named by the user, is a data file."""
    is_cache = MAP_CACHE.fullmatch(path.name) or (
        NAMED_CACHE.fullmatch(path.name) and any((path.parent / name).is_file() for name in CACHE_METADATA)
    )
    return path.name not in METADATA and not is_cache and suffixes_of(path) is not None and path.is_file()


def checked_file(path: Path) -> Path:
    """Return `path` if it may contain rows.

    Raises:
        DataError: its type is not supported, or not when compressed; or it is empty, missing, or a Git LFS pointer.
    """
    if (suffixes := suffixes_of(path)) is None:
        raise DataError(
            f"{printable(path)} is of a file type that is not supported", hint=f"Use a {supported_suffixes()} file."
        )
    suffix, compression = suffixes
    if suffix in NEEDS_SEEKING and compression:
        raise DataError(
            f"{printable(path)}: a {suffix} file can't be read when it is compressed as a whole",
            hint=f"Decompress it first, so that its name ends in {suffix} instead of {compression}.",
        )
    try:
        num_bytes = path.stat().st_size
        with open_regular(path) as file:
            is_pointer = num_bytes <= MAX_POINTER_BYTES and file.read(len(POINTER)) == POINTER
    except OSError as error:
        raise DataError(f"{printable(path)} can't be read: {error.strerror}", hint="Is it still there?") from error
    if num_bytes == 0:
        raise DataError(f"{printable(path)} is empty", hint="Give a file with at least one row.")
    if is_pointer:
        raise DataError(
            f"{printable(path)} is a Git LFS pointer to the data, which was not downloaded",
            hint="In its repository run: git lfs install && git lfs pull",
        )
    return path
