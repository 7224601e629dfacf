"""Find files by a pattern. Every directory is gone into once, however many links lead to it."""

import os
from collections.abc import Iterator
from glob import escape, glob, has_magic
from itertools import dropwhile
from pathlib import Path

ANY_DEPTH = "**"


def matches(pattern: str) -> list[Path]:
    """Return everything that `pattern` finds, sorted; nothing if it is no glob."""
    if not has_magic(pattern):
        return []
    try:
        found = _expand(str(Path(pattern).expanduser()))
    except (OSError, ValueError, RuntimeError):  # a NUL byte, a home directory of nobody
        return []
    return sorted(set(map(Path, found)))


def directories_below(top: str | Path) -> Iterator[Path]:
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
        yield Path(directory)


def _expand(pattern: str) -> list[str]:
    """Return what `pattern` finds; `**` goes into each directory below once, however many links lead to it."""
    parts = Path(pattern).parts
    if ANY_DEPTH not in parts:
        # `Path.glob` takes no absolute pattern, and finds hidden files.
        return glob(pattern)  # noqa: PTH207
    place = parts.index(ANY_DEPTH)
    behind = [*dropwhile(lambda part: part == ANY_DEPTH, parts[place:])] or ["*"]
    tops = glob(str(Path(*parts[:place]))) if place else ["."]  # noqa: PTH207
    directories = [escape(str(directory)) for top in tops for directory in directories_below(top)]
    return [found for directory in directories for found in _expand(str(Path(directory, *behind)))]
