"""Check files and folders: whether they exist, how large they are, whether they can be written."""

import dataclasses
import errno
import os
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from io import BufferedReader
from pathlib import Path
from typing import Any

from qlora_cli.errors import DiskSpaceError, OutputDirectoryError, QloraError
from qlora_cli.units import MIB, format_bytes
from qlora_cli.writing import LEFTOVER, is_leftover

# Separators of values: each list, object and element is preceded by one. Those within strings are counted too.
JSON_SEPARATORS, TEXT_SEPARATORS = b"{[,", b" \t\r\n\v\f"


@dataclass(frozen=True, kw_only=True)
class FileLimit:
    """The limits of one kind of file; its values are counted by their `separators`."""

    max_bytes: int
    max_values: int
    separators: bytes = JSON_SEPARATORS

    def check(self, content: bytes) -> None:
        """Check the content of a file.

        Raises:
            ValueError: it exceeds a limit.
        """
        self.check_size(len(content))
        num_values = len(content) - len(content.translate(None, self.separators))
        if num_values > self.max_values:
            raise ValueError(f"it holds more than {self.max_values:,} values")

    def check_size(self, num_bytes: int) -> None:
        """Check the size of a file.

        Raises:
            ValueError: it is too large.
        """
        if num_bytes > self.max_bytes:
            raise ValueError(f"it is larger than {format_bytes(self.max_bytes)}")


SMALL = FileLimit(max_bytes=32 * MIB, max_values=1_500_000)  # a hundred thousand lines of a trainer's log


def open_regular(path: Path) -> BufferedReader:
    """Open an untrusted file to read its bytes; never block, as opening a pipe would.

    Raises:
        OSError: it can't be opened, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, os.strerror(number) if stat.S_ISDIR(mode) else "it is no file", str(path))
    return os.fdopen(descriptor, "rb")


def read_small(path: Path) -> str:
    """Return the text of a file that is read as a whole, such as a JSON record.

    Raises:
        FileNotFoundError: it does not exist.
        OSError: it can't be read.
        ValueError: it is not a regular file, exceeds the limits `SMALL`, or is not UTF-8.
    """
    SMALL.check_size(path.stat().st_size)
    if not path.is_file():  # reading a pipe would block
        raise ValueError("it is no file")
    content = path.read_bytes()
    SMALL.check(content)
    return content.decode("utf-8")


STAGING_NAME_BYTES = 40  # added to the name of a directory while it is written, or when it is moved aside
CONTENT_PATH_BYTES = 200  # the longest relative path of a file in one


def existing_path(name: str | Path) -> Path | None:
    """Return the path `name` with `~` expanded; None if it does not exist or can't be accessed."""
    try:
        path = Path(name).expanduser()
        path.stat()
    except (OSError, ValueError, RuntimeError):  # missing, not accessible, too long, an unknown user
        return None
    return path


def is_regular(path: Path) -> bool:
    """Return whether there is a file at `path`, which may come from untrusted input and be invalid."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or not accessible
        return False


def path_problem(directory: Path, flag: str = "--output") -> QloraError | None:
    """Return the error if no directory can be created at this path, given by `flag`; None if one can."""
    try:
        reason = _reason_unusable(directory)
    except ValueError:
        reason = f"{str(directory)!r} can't be used: a path can't contain a NUL byte"
    except OSError as error:
        reason = f"{directory} can't be used: {error.strerror}"
    return None if reason is None else OutputDirectoryError(reason, hint=f"Choose another {flag}.")


def _reason_unusable(directory: Path) -> str | None:
    with suppress(FileNotFoundError, NotADirectoryError):
        directory.stat()
        return None if directory.is_dir() else f"{directory} is a file"
    parent = existing_parent(directory)
    missing = directory.absolute().relative_to(parent).parts
    if (parent / missing[0]).is_symlink():
        return f"{parent / missing[0]} is a broken link"
    if not parent.is_dir():
        return f"{parent} is a file"
    if not os.access(parent, os.W_OK | os.X_OK):
        return f"{parent} can't be written to"
    longest = max(*map(_num_bytes, missing), _num_bytes(missing[-1]) + STAGING_NAME_BYTES)
    is_long = longest > os.pathconf(parent, "PC_NAME_MAX")
    if is_long or _num_bytes(str(directory.absolute())) + CONTENT_PATH_BYTES > os.pathconf(parent, "PC_PATH_MAX"):
        return f"{directory} can't be used: {os.strerror(errno.ENAMETOOLONG)}"
    return None


def _num_bytes(name: str) -> int:
    return len(os.fsencode(name))


def check_output_directory(directory: Path, flag: str = "--output") -> QloraError | None:
    """Return the error if `directory`, given by `flag`, is not empty or can't be created; None if it is usable."""
    if (problem := path_problem(directory, flag)) is not None or not directory.is_dir():
        return problem
    was_killed = is_leftover(directory / LEFTOVER)
    try:
        names = [path.name for path in directory.iterdir()]
    except OSError as error:
        return OutputDirectoryError(f"{directory} can't be used: {error.strerror}", hint=f"Choose another {flag}.")
    content = sorted(name for name in names if not (was_killed and name == LEFTOVER))
    if content:
        hint = f"Choose a directory for {flag} that is empty or does not exist."
        return OutputDirectoryError(
            f"{directory} contains other files ({', '.join(content[:3])})",
            hint=f"{hint} The last write there was not finished." if was_killed else hint,
        )
    if not os.access(directory, os.W_OK | os.X_OK):
        return OutputDirectoryError(f"{directory} can't be written to", hint=f"Choose another {flag}.")
    return None


def check_disk_space(directory: Path, needed_bytes: int, hint: str) -> None:
    """Check that `needed_bytes` fit on the disk of `directory`, which may not exist yet.

    Raises:
        DiskSpaceError: they do not.
    """
    free = shutil.disk_usage(existing_parent(directory)).free
    if free < needed_bytes:
        raise DiskSpaceError(
            f"up to {format_bytes(needed_bytes)} would be written to {directory}, "
            f"but only {format_bytes(free)} are free",
            hint=hint,
        )


def size_of(directory: Path) -> int:
    """Return the total bytes of all files below a directory; 0 if it does not exist."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def existing_parent(path: Path) -> Path:
    """Return `path` or its nearest ancestor that exists."""
    path = path.absolute()
    while existing_path(path) is None:
        path = path.parent
    return path


def as_json(value: Any) -> Any:
    """Return `value` with paths, enums and dataclasses converted to JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return as_json(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value
