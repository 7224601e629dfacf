"""Where results that cost time are kept, and what their names must depend on so that a stale one is impossible."""

import hashlib
import os
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qlora_cli.errors import UsageError

PACKAGE = Path(__file__).parent


def cache_folder(part: str) -> Path:
    """Return where results of one kind are kept: below `QLORA_CACHE`, or the user's cache directory.

    Raises:
        UsageError: the name of that directory is no UTF-8.
    """
    given = os.environ.get("QLORA_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(given) if given else Path(base) / "qlora"
    try:
        str(folder).encode("utf-8")
    except UnicodeEncodeError as error:  # what writes tables takes no such name
        raise UsageError(
            f"results can't be kept in {str(folder)!r}: the name is no UTF-8",
            hint="Set QLORA_CACHE to a directory that has another name.",
        ) from error
    return folder / part


def is_digest(name: str) -> bool:
    """Whether a file or folder is named as `digest_of` names results: nobody else's is."""
    return re.fullmatch(r"[0-9a-f]{64}", name) is not None


def versions_of(packages: Iterable[str]) -> list[str]:
    """Return name and version of each package."""
    return [f"{name} {_version(name)}" for name in packages]


def code_digests(parts: Iterable[str]) -> list[str]:
    """Return the digest of all code of our own in these parts of the package."""
    return [hashlib.sha256(path.read_bytes()).hexdigest() for part in parts for path in code_files(part)]


def code_files(part: str) -> list[Path]:
    """Return the files of code in a part of the package: a folder with all below it, or a single file by its name.

    The template of a page is no code.
    """
    place = PACKAGE / part
    return [place] if place.is_file() else sorted(place.rglob("*.py"))


def digest_of(parts: Iterable[str]) -> str:
    """Return the name of a result that depends on all of `parts`."""
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
