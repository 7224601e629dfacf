"""Files and folders written whole or not at all: complete or absent, whatever happens."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from glob import escape
from pathlib import Path

import psutil

LEFT_OVER = ".saving"  # in a directory that is filled, if the process was killed; the next one clears it
MOVED = "moved.json"  # in it: what is being moved out of it, by name and inode


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
    for path in half_moved(directory):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def half_moved(directory: Path) -> list[Path]:
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
