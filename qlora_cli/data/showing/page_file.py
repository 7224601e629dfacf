"""Check whether a page can be written to the path that the user gave, before anything is read."""

import os
from contextlib import suppress
from pathlib import Path

from qlora_cli.errors import OutputDirectoryError, QloraError

PAGE_SUFFIXES = (".html", ".htm")


def check_page(path: Path) -> QloraError | None:
    """Return the error if no page can be written to `path`."""
    try:
        return _path_error(path)
    except ValueError:
        return OutputDirectoryError(f"{str(path)!r}: a path can't contain a NUL byte", hint="Choose another name.")
    except OSError as error:  # a name that is too long
        return OutputDirectoryError(f"{path} can't be used: {error.strerror}", hint="Choose another name.")


def _path_error(path: Path) -> QloraError | None:
    with suppress(FileNotFoundError, NotADirectoryError):
        path.lstat()
    if path.is_dir():
        return OutputDirectoryError(f"{path} is a directory", hint="Name a file.")
    if path.exists() and not path.is_file():  # replacing /dev/null by a page would be a surprise
        return OutputDirectoryError(f"{path} is not a regular file", hint="Name a file.")
    if path.exists() and path.suffix.lower() not in PAGE_SUFFIXES:  # it may be the data
        hint = f"Choose a new name, or one that ends in {' or '.join(PAGE_SUFFIXES)}."
        return OutputDirectoryError(f"{path} would overwrite a file that is not a page", hint=hint)
    folder = path.absolute().parent
    if not folder.is_dir():
        return OutputDirectoryError(f"{path}: there is no directory {folder}", hint="Create it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        return OutputDirectoryError(f"{path}: {folder} can't be written to", hint="Choose another directory.")
    return None
