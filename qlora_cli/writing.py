"""The one place that writes, replaces and deletes: complete or absent after, and never through a link.

Directories may be somebody else's: unpacked from an archive, cloned, or shared with other users. So what is written
aside has a fresh random name and must not be there yet, nothing is followed to where it leads, and only what carries
our mark is deleted.
"""

import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

import psutil

from qlora_cli.errors import OutputDirectoryError

LEFT_OVER = ".saving"  # in a directory that is filled, if the process was killed; the next one clears it
MARK = "written-by-qlora"  # in a folder that is written aside, beside what will be moved out of it
WHOLE = "whole"
PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700


def write_file(target: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Write a file aside, flush it to disk, and move it there in one step; of a link, the link is replaced.

    `mode` is what the user's mask leaves of it.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    aside = target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}.saving")
    try:
        with os.fdopen(_open(aside, os.O_WRONLY | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def append_line(file: Path, line: str, *, mode: int = PRIVATE_FILE) -> None:
    """Append a line to a file, which is made if it is not there.

    Raises:
        OSError: it is a link, has another name or is no file, or can't be written to.
    """
    if os.path.lexists(file) and (reason := not_in_place(file)):
        raise PermissionError(f"{file} {reason}")
    with os.fdopen(_open(file, os.O_WRONLY | os.O_APPEND, mode), "a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def not_in_place(file: Path) -> str | None:
    """Return why nothing may be written into what is there by the name of a file; None if it may."""
    found = file.lstat()
    if stat.S_ISLNK(found.st_mode):
        return "is a link"
    if not stat.S_ISREG(found.st_mode):
        return "is no file"
    return "has another name, by which something else would be changed" if found.st_nlink > 1 else None


def end_line(file: Path) -> None:
    """End a line that a killed process left unfinished, so that the next one stands alone.

    Raises:
        OSError: it is a link, or can't be written to.
    """
    if not os.path.lexists(file):
        return
    if reason := not_in_place(file):
        raise PermissionError(f"{file} {reason}")
    if file.stat().st_size == 0:
        return
    with os.fdopen(os.open(file, os.O_RDWR | os.O_NOFOLLOW), "rb+") as stream:
        stream.seek(-1, os.SEEK_END)
        if stream.read(1) != b"\n":
            stream.write(b"\n")


def _open(file: Path, flags: int, mode: int) -> int:
    return os.open(file, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode)


def private_folder(folder: Path) -> Path:
    """Make a folder that only its owner can look into, unless it is there; return it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
    return folder


def copy_file(source: Path, target: Path) -> None:
    """Copy a file of a model's directory, which may lead elsewhere within it only, or to the cache that it lies in.

    Raises:
        OSError: it leads out of its directory.
    """
    if leads_out(source):
        raise PermissionError(f"{source} is a link out of its directory, to {source.resolve()}: it is not followed")
    shutil.copyfile(source.resolve(), target)


def leads_out(file: Path) -> bool:
    """Whether a file is a link to what is not in its directory, nor among the blobs of the hub's cache beside it."""
    place, real = file.parent.resolve(), file.resolve()
    # A snapshot of that cache is a folder of links.
    blobs = [place.parent.parent / "blobs"] if place.parent.name == "snapshots" else []
    return not any(real.is_relative_to(folder) for folder in (place, *blobs))


def copy_folder(source: Path, target: Path) -> None:
    """Copy all of a folder into `target`; links in it stay out.

    Raises:
        OSError: it can't be read or written.
    """

    def links(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if (Path(folder) / name).is_symlink()]

    shutil.copytree(source, target, dirs_exist_ok=True, ignore=links)


def write_directory(target: Path, fill: Callable[[Path], None], *, may_replace: bool = True) -> None:
    """Let `fill` write into a folder beside `target`, flush it to disk, and move it there in one step.

    What is at `target` goes once the new one is there, unless it may not be replaced.

    Raises:
        OutputDirectoryError: it may not, and something came there meanwhile.
    """
    clear_left_overs(target.parent, target.name)
    with _staging(target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(8)}.saving")) as whole:
        fill(whole)
        if may_replace:
            publish_directory(whole, target)
        else:
            _flush_all(whole)
            try:
                whole.rename(target)  # an error, unless it is absent or an empty directory
            except OSError as error:
                raise (_filled_meanwhile(target) if os.path.lexists(target) else error) from error
            flush(target.parent)


def _filled_meanwhile(target: Path) -> OutputDirectoryError:
    return OutputDirectoryError(
        f"something else came to {target} while it was written", hint="Choose another --output, and try again."
    )


def fill_directory(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write what `target`, which is empty or absent, is to hold: all of it or nothing.

    An empty one stays the directory that it is, for a shell that is in it, a link to it, or a disk mounted there.
    `config.json`, without which nothing is a model, comes last: a process that is killed while names are moved leaves
    no model.
    """
    if not target.is_dir():
        write_directory(target, fill, may_replace=False)
        return
    inside = target / LEFT_OVER
    if is_left_over(inside):
        delete(inside)
    moved: list[Path] = []
    with _staging(inside) as whole:
        fill(whole)
        _flush_all(whole)
        try:
            for path in sorted(whole.iterdir(), key=lambda path: path.name == "config.json"):
                if os.path.lexists(target / path.name):
                    raise _filled_meanwhile(target)
                moved.append(path.rename(target / path.name))
        except BaseException:
            for path in moved:
                path.rename(whole / path.name)
            raise
        flush(target)


@contextmanager
def _staging(place: Path) -> Iterator[Path]:
    """Make a folder to write into, within one that carries our mark, and delete it with the parents made for it."""
    made = [parent for parent in place.parents if not parent.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.mkdir(mode=PRIVATE_FOLDER)  # an error if it is there, also as a link
    try:
        (place / MARK).touch()
        whole = place / WHOLE
        whole.mkdir()
        yield whole
    except BaseException:
        delete(place)
        for parent in made:
            with suppress(OSError):  # something else is in it by now
                parent.rmdir()
        raise
    delete(place)


def is_left_over(place: Path) -> bool:
    """Whether a folder is what a killed process of this user left: no link, with our mark, and nothing besides."""
    if place.is_symlink() or not (place / MARK).is_file() or place.stat().st_uid != os.getuid():
        return False
    return {path.name for path in place.iterdir()} <= {MARK, WHOLE}


def clear_left_overs(folder: Path, name: str | None = None) -> None:
    """Delete what processes that were killed left in a folder, of writing `name`, or of writing anything."""
    for place in folder.glob(f".{'*' if name is None else escape(name)}.*-*.saving"):
        writer = place.name.split(".")[-2].partition("-")[0]
        if writer.isdigit() and not psutil.pid_exists(int(writer)) and is_left_over(place):
            delete(place)


def publish_directory(finished: Path, target: Path) -> None:
    """Flush all of `finished` to disk, then rename it to `target`; what was there goes once the new one is there."""
    _flush_all(finished)
    replaced = target.with_name(f".{target.name}.{secrets.token_hex(8)}.old")
    if os.path.lexists(target):
        target.rename(replaced)
    finished.rename(target)
    flush(target.parent)
    delete(replaced)


def delete(place: Path) -> None:
    """Delete a file, or a folder with all that is in it, if it is there; a link goes, never what it leads to."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)  # which would wait for a pipe
    elif os.path.lexists(place):
        place.unlink(missing_ok=True)


def _flush_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
