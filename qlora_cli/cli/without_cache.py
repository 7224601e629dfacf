"""Go on without a cache where the home directory is missing or can't be written to, and say so."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from qlora_cli.cache import cache_folder
from qlora_cli.cli.stderr import print_line

CACHE = "QLORA_CACHE"


def ensure_cache(context: Any) -> None:
    """Use a temporary directory as the cache, until the command ends, if the default one can't be written to.

    A directory that the user names in `QLORA_CACHE` is never replaced: it is an error if it can't be written to.
    """
    folder = cache_folder("data").parent
    if os.environ.get(CACHE) or _can_be_made(folder):
        return
    temporary = tempfile.mkdtemp(prefix="qlora-")
    os.environ[CACHE] = temporary
    context.call_on_close(lambda: _remove(temporary))
    print_line(f"warning: {folder} can't be written to: nothing is cached (set {CACHE} to a directory that can)")


def _can_be_made(folder: Path) -> bool:
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError:  # a file in its path
        return False
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _remove(temporary: str) -> None:
    if os.environ.get(CACHE) == temporary:
        del os.environ[CACHE]
    shutil.rmtree(temporary, ignore_errors=True)
