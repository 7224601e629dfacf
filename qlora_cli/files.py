"""Files and folders as the project writes them: checked before, complete or absent after."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from glob import escape
from pathlib import Path
from typing import Any

import psutil

from qlora_cli.errors import DiskSpaceError, OutputDirectoryError, QloraError
from qlora_cli.units import format_bytes

LEFT_OVER = ".saving"  # in a directory that is filled, if the process was killed; the next one clears it
MOVED = "moved.json"  # in it: what is being moved out of it, by name and inode


def existing_path(name: str | Path) -> Path | None:
    """Return the path that `name` stands for, with `~` expanded, or None if there is nothing to be found by it."""
    try:
        path = Path(name).expanduser()
        path.stat()
    except (OSError, ValueError, RuntimeError):  # not there, not to be looked at, too long, a user that is none
        return None
    return path


def check_output_directory(directory: Path, flag: str = "--output") -> QloraError | None:
    """Return why nothing can be written to `directory`, which `flag` names: it is not empty, or can't be made."""
    try:
        return _output_problem(directory, flag)
    except OSError as error:
        return OutputDirectoryError(f"{directory} can't be used: {error.strerror}", hint=f"Choose another {flag}.")


def _output_problem(directory: Path, flag: str) -> QloraError | None:
    if directory.is_dir():
        own = {path.name for path in _half_moved(directory)} | {LEFT_OVER}
        held = sorted(path.name for path in directory.iterdir() if path.name not in own)
        if held:
            return OutputDirectoryError(
                f"{directory} holds something else ({', '.join(held[:3])})",
                hint=f"Choose a directory for {flag} that is empty or does not exist.",
            )
    elif directory.exists():
        return OutputDirectoryError(f"{directory} is a file", hint=f"Choose another {flag}.")
    elif directory.is_symlink():
        return OutputDirectoryError(f"{directory} is a link to nothing", hint=f"Choose another {flag}.")
    parent = existing_parent(directory)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        return OutputDirectoryError(f"{parent} can't be written to", hint=f"Choose another {flag}.")
    return None


def check_disk_space(directory: Path, needed_bytes: int, hint: str) -> None:
    """Check that `needed_bytes` fit on the disk that `directory` is or will be on.

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
    """Return the bytes of all files below a directory; 0 if it is not there."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def existing_parent(path: Path) -> Path:
    """Return `path` or its nearest ancestor that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def write_directory(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a folder beside `target`, flush it to disk, and move it there in one step."""
    for left_over in target.parent.glob(f".{escape(target.name)}.*.saving"):
        writer = left_over.name.split(".")[-2]
        if writer.isdigit() and not psutil.pid_exists(int(writer)):  # it was killed
            _delete(left_over)
    saving = target.with_name(f".{target.name}.{os.getpid()}.saving")
    shutil.rmtree(saving, ignore_errors=True)
    made = [parent for parent in saving.parents if not parent.exists()]
    saving.mkdir(parents=True)
    try:
        fill(saving)
        publish_directory(saving, target)
    except BaseException:
        shutil.rmtree(saving, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # something else is in it by now
                parent.rmdir()
        raise


def fill_directory(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write what `target`, which is empty or absent, is to hold: all of it or nothing.

    An empty one stays the directory that it is, for a shell that is in it, a link to it, or a disk mounted there.
    `config.json`, without which nothing is a model, comes last.
    """
    if not target.is_dir():
        write_directory(target, fill)
        return
    inside = target / LEFT_OVER
    _take_back(target)
    shutil.rmtree(inside, ignore_errors=True)
    inside.mkdir()
    try:
        write_directory(inside / "whole", fill)
        whole = sorted((inside / "whole").iterdir(), key=lambda path: path.name == "config.json")
        write_file(inside / MOVED, json.dumps({path.name: path.stat().st_ino for path in whole}))
        for path in whole:
            path.rename(target / path.name)
    except BaseException:
        _take_back(target)
        raise
    finally:
        shutil.rmtree(inside, ignore_errors=True)


def _take_back(directory: Path) -> None:
    for path in _half_moved(directory):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _half_moved(directory: Path) -> list[Path]:
    """Return what was moved into `directory` by a process that was to move more, and was killed."""
    journal, whole = directory / LEFT_OVER / MOVED, directory / LEFT_OVER / "whole"
    if not (journal.is_file() and whole.is_dir() and any(whole.iterdir())):  # none, or all was moved
        return []
    inodes: dict[str, int] = json.loads(journal.read_text(encoding="utf-8"))
    places = [directory / name for name in inodes]
    return [path for path in places if path.exists() and path.stat().st_ino == inodes[path.name]]


def publish_directory(finished: Path, target: Path) -> None:
    """Flush all of `finished` to disk, then rename it to `target`; what was there goes once the new one is there."""
    for path in [*finished.rglob("*"), finished]:
        flush(path)
    replaced = finished.with_name(f".{target.name}.old.{os.getpid()}.saving")
    _delete(replaced)  # of an earlier process with our number
    if os.path.lexists(target):
        target.rename(replaced)
    finished.rename(target)
    flush(target.parent)
    _delete(replaced)


def _delete(directory: Path) -> None:
    """Delete a directory, if it is there; of a link to one, the link, which may lead to nothing."""
    if directory.is_symlink():
        directory.unlink()
    else:
        shutil.rmtree(directory, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(target: Path, text: str) -> None:
    """Write a text file aside, flush it to disk, and move it there in one step."""
    saving = target.with_name(f".{target.name}.saving")
    try:
        saving.write_text(text, encoding="utf-8")
        flush(saving)
        saving.replace(target)
    except BaseException:
        saving.unlink(missing_ok=True)
        raise


def as_json(value: Any) -> Any:
    """Return `value` with paths, enums and dataclasses turned into what JSON holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return as_json(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value
