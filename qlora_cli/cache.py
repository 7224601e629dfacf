"""Where expensive results are cached, and what their names depend on, so that a stale one is never used."""

import functools
import hashlib
import os
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qlora_cli.errors import UsageError

PACKAGE = Path(__file__).parent


def cache_folder(part: str) -> Path:
    """Return the folder for cached results of one kind: below `QLORA_CACHE`, or the user's cache directory.

    Raises:
        UsageError: the path of that directory is not valid UTF-8.
    """
    configured = os.environ.get("QLORA_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(configured) if configured else Path(base) / "qlora"
    try:
        str(folder).encode("utf-8")
    except UnicodeEncodeError as error:  # pyarrow does not accept such a path
        raise UsageError(
            f"{str(folder)!r} can't be used as a cache: its name is not valid UTF-8",
            hint="Set QLORA_CACHE to a directory with another name.",
        ) from error
    return folder / part


def is_digest(name: str) -> bool:
    """Return whether a file or folder has a name that `digest_of` gives; no other files have such names."""
    return re.fullmatch(r"[0-9a-f]{64}", name) is not None


def versions_of(packages: Iterable[str]) -> list[str]:
    """Return the name and version of each package."""
    return [f"{name} {_version(name)}" for name in packages]


def code_digests(parts: Iterable[str]) -> list[str]:
    """Return the digest of each file of our own code in these parts of the package."""
    files = [path for part in parts for path in code_files(part)]
    return [_digest_of_code(path, (stat.st_mtime_ns, stat.st_size)) for path in files for stat in [path.stat()]]


def code_files(part: str) -> list[Path]:
    """Return the Python files in a part of the package: those below a folder, or a single file."""
    path = PACKAGE / part
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def digest_of(parts: Iterable[str]) -> str:
    """Return the name of a result that depends on all of `parts`."""
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()


@functools.cache
def _digest_of_code(path: Path, _state: tuple[int, int]) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
