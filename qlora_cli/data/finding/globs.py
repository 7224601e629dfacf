"""Expand glob patterns. Every directory is visited once, however many links lead to it."""

import os
from collections.abc import Iterator
from glob import escape, glob, has_magic
from itertools import dropwhile
from pathlib import Path

ANY_DEPTH = "**"


def expand_glob(pattern: str) -> list[Path]:
    """Return all paths that match `pattern`, sorted; an empty list if it has no wildcard."""
    if not has_magic(pattern):
        return []
    try:
        paths = _expand(str(Path(pattern).expanduser()))
    except (OSError, ValueError, RuntimeError):  # a NUL byte, an unknown user's home directory
        return []
    return sorted(set(map(Path, paths)))


def directories_below(top: str | Path) -> Iterator[Path]:
    """Yield `top` and all directories below it but hidden ones, each once; a directory comes before links to it."""
    seen = set()
    for directory, names, _ in os.walk(top, followlinks=True):
        stat = Path(directory).stat()
        if (stat.st_dev, stat.st_ino) in seen:
            names.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        shown = [name for name in names if not name.startswith(".")]
        names[:] = sorted(shown, key=lambda name: (Path(directory, name).is_symlink(), name))
        yield Path(directory)


def _expand(pattern: str) -> list[str]:
    """Return the paths that match `pattern`; `**` visits each directory once, however many links lead to it."""
    parts = Path(pattern).parts
    if ANY_DEPTH not in parts:
        # `Path.glob` accepts no absolute pattern, and matches hidden files.
        return glob(pattern)  # noqa: PTH207
    index = parts.index(ANY_DEPTH)
    remaining = [*dropwhile(lambda part: part == ANY_DEPTH, parts[index:])] or ["*"]
    tops = glob(str(Path(*parts[:index]))) if index else ["."]  # noqa: PTH207
    directories = [escape(str(directory)) for top in tops for directory in directories_below(top)]
    return [path for directory in directories for path in _expand(str(Path(directory, *remaining)))]
