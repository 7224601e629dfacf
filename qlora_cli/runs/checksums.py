"""The size and SHA-256 of each file that a run wrote into a folder, to recognize it later. Imports no torch."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Checksums = Mapping[str, Any]  # by the file's path relative to the folder; from an untrusted file, so of any type


def checksums_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the size and SHA-256 of each file below a folder."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def is_as_written(path: Path, expected: object) -> bool:
    """Return whether a file has the `expected` size and SHA-256.

    Raises:
        OSError: it does not exist, or can't be read.
    """
    if not isinstance(expected, Mapping):
        return False
    return path.stat().st_size == expected.get("bytes") and _digest(path) == expected.get("sha256")


def find_foreign_content(
    folder: Path, known: Sequence[Checksums], *, but: str | None = None, reads: bool = True
) -> str | None:
    """Describe content of a folder that no run wrote, or that was changed since; None if there is none.

    Each file must have one of the `known` checksums, except the file named `but`. With `reads`, the content of files
    is checked, otherwise only their names.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name == but or (path.is_dir() and not path.is_symlink()):
            continue
        expected = [sums[name] for sums in known if name in sums]
        if not expected or not path.is_file() or path.is_symlink():
            return f"it holds {name}, which no run wrote"
        if reads and not any(is_as_written(path, one) for one in expected):
            return f"{name} in it was changed since it was written"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
