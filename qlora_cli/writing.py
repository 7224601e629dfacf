"""The one place that writes, replaces and deletes: complete or absent after, and never through a link.

Directories may be somebody else's: unpacked from an archive, cloned, or shared with other users. So what is written
aside has a fresh random name and must not be there yet, nothing is followed to where it leads, and only what carries
our mark is deleted.
"""

import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from glob import escape
from pathlib import Path

import psutil

from qlora_cli.errors import OutputDirectoryError

LEFTOVER = ".saving"  # in a directory that is filled, if the process was killed; the next one clears it
MARK = "written-by-qlora"  # in a folder that is written aside, next to what will be moved out of it
WHOLE = "whole"
PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
USUAL_FILE = 0o666  # of which the user's mask takes away
STAGED = re.compile(r"\..+\.\d+-[0-9a-f]{16}\.saving")  # as `_staging_path` names folders
APPENDING = os.O_WRONLY | os.O_APPEND | os.O_CREAT


def write_file(target: Path, content: str | bytes, *, mode: int = USUAL_FILE) -> None:
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
        OSError: it is a link, has another name, is no file or another user's, or can't be written to.
    """
    with os.fdopen(_open_in_place(file, APPENDING, mode), "a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def end_line(file: Path) -> None:
    """End a line that a killed process left unfinished, so that the next one stands alone.

    Raises:
        OSError: it is a link, has another name, is no file or another user's, or can't be written to.
    """
    if not os.path.lexists(file):
        return
    with os.fdopen(_open_in_place(file, os.O_RDWR), "rb+") as stream:
        if stream.seek(0, os.SEEK_END) == 0:
            return
        stream.seek(-1, os.SEEK_END)
        if stream.read(1) != b"\n":
            stream.write(b"\n")


def unsafe_reason(file: Path) -> str | None:
    """Return why nothing may be written into, or read from, what has the name of a file of ours; None if it may."""
    return _unsafe_stat_reason(file.lstat(), file.parent)


def _unsafe_stat_reason(found: os.stat_result, folder: Path) -> str | None:
    if stat.S_ISLNK(found.st_mode):
        return "is a link"
    if not stat.S_ISREG(found.st_mode):
        return "is no file"
    if found.st_nlink > 1:
        return "has another name, by which something else would be changed"
    return None if is_owned_by_user(found, folder) else f"belongs to another user (uid {found.st_uid})"


def is_owned_by_user(found: os.stat_result, folder: Path) -> bool:
    """Whether what was found in a folder is this user's, or has the owner of all that this user makes there.

    A disk of a network, or one that is mounted for others, may give every file an owner of its own.
    """
    return not hasattr(os, "getuid") or found.st_uid == os.getuid() or found.st_uid == _owner_of_new(folder)


def _owner_of_new(folder: Path) -> int | None:
    new = folder / f".{secrets.token_hex(8)}.saving"
    try:
        owner = private_file(new).stat().st_uid
        new.unlink()
    except OSError:  # nothing can be made there
        return None
    return owner


def _open_in_place(file: Path, flags: int, mode: int = PRIVATE_FILE) -> int:
    if os.path.lexists(file) and (reason := unsafe_reason(file)):
        raise PermissionError(f"{file} {reason}")
    # Looked at again once it is open: it may be another by then, of which a pipe would wait for its reader.
    descriptor = os.open(file, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, mode)
    if reason := _unsafe_stat_reason(os.fstat(descriptor), file.parent):
        os.close(descriptor)
        raise PermissionError(f"{file} {reason}")
    return descriptor


def _open(file: Path, flags: int, mode: int) -> int:
    return os.open(file, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode)


def private_folder(folder: Path) -> Path:
    """Make a folder that only its owner can look into, unless it is there; return it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
    return folder


def private_file(file: Path) -> Path:
    """Make an empty file that only its owner can read, unless there is something by its name; return it."""
    if not os.path.lexists(file):
        os.close(_open(file, os.O_WRONLY | os.O_EXCL, PRIVATE_FILE))
    return file


def copy_file(source: Path, target: Path) -> None:
    """Copy a file of a model's directory, which may lead elsewhere within it only, or to the cache that it lies in.

    Raises:
        OSError: it leads out of its directory.
    """
    if escapes_directory(source):
        end = resolve_links(source) or "itself"
        raise PermissionError(f"{source} is a link out of its directory, to {end}: it is not followed")
    shutil.copyfile(source.resolve(), target)


def escapes_directory(file: Path) -> bool:
    """Whether a file is a link to what is not in its directory, nor among the blobs of the hub's cache next to it."""
    place, real = file.parent.resolve(), resolve_links(file)
    if real is None:
        return True
    # A snapshot of that cache is a folder of links.
    blobs = [place.parent.parent / "blobs"] if place.parent.name == "snapshots" else []
    return not any(real.is_relative_to(folder) for folder in (place, *blobs))


def resolve_links(file: Path) -> Path | None:
    """Return where a path leads in the end, through all links; None if they lead round in a circle."""
    try:
        return file.resolve()
    except (OSError, RuntimeError):  # as Python up to 3.12 says it
        return None


def copy_folder(source: Path, target: Path) -> None:
    """Copy all of a folder into `target`; links in it stay out.

    Raises:
        OSError: it can't be read or written.
    """

    def links(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if (Path(folder) / name).is_symlink()]

    shutil.copytree(source, target, dirs_exist_ok=True, ignore=links)


def write_directory(target: Path, fill: Callable[[Path], None], *, may_replace: bool = True) -> None:
    """Let `fill` write into a folder next to `target`, flush it to disk, and move it there in one step.

    What is at `target` goes once the new one is there, unless it may not be replaced.

    Raises:
        OutputDirectoryError: it may not, and something came there meanwhile.
    """
    clear_leftovers(target.parent, target.name)
    with staging(target) as whole:
        fill(whole)
        if may_replace:
            publish_directory(whole, target)
        else:
            _flush_all(whole)
            try:
                whole.rename(target)  # an error, unless it is absent or an empty directory
            except OSError as error:
                raise (_filled_concurrently(target) if os.path.lexists(target) else error) from error
            flush(target.parent)


def _filled_concurrently(target: Path) -> OutputDirectoryError:
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
    inside = target / LEFTOVER
    if is_leftover(inside):
        _delete_marked(inside)
    moved: list[Path] = []
    with _staging_folder(inside) as whole:
        fill(whole)
        _flush_all(whole)
        try:
            for path in sorted(whole.iterdir(), key=lambda path: path.name == "config.json"):
                if os.path.lexists(target / path.name):
                    raise _filled_concurrently(target)
                moved.append(path.rename(target / path.name))
        except BaseException:
            for path in moved:
                path.rename(whole / path.name)
            raise
        flush(target)


def staging(target: Path) -> AbstractContextManager[Path]:
    """Give a folder next to `target` to write into, whose name nobody can know before; it is deleted at the end."""
    return _staging_folder(_staging_path(target))


def _staging_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(8)}.saving")


@contextmanager
def _staging_folder(place: Path) -> Iterator[Path]:
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
        _delete_marked(place)
        for parent in made:
            with suppress(OSError):  # something else is in it by now
                parent.rmdir()
        raise
    _delete_marked(place)


def discard(place: Path) -> None:
    """Delete a folder of ours: gone at once, and what a killed process leaves of it carries our mark.

    Raises:
        OSError: it can't be moved.
    """
    aside = _staging_path(place)
    aside.mkdir(mode=PRIVATE_FOLDER)
    (aside / MARK).touch()
    try:
        place.rename(aside / WHOLE)
    finally:
        _delete_marked(aside)


def move_aside(place: Path, name: str) -> Path:
    """Rename a file or folder within its directory, to a name that nothing has yet; return where it is."""
    aside = place.with_name(name)
    if os.path.lexists(aside):
        aside = place.with_name(f"{name}-{secrets.token_hex(4)}")
    return place.rename(aside)


def is_leftover(place: Path) -> bool:
    """Whether a folder is what a killed process of this user left: no link, with our mark, and nothing besides."""
    if place.is_symlink() or not (place / MARK).is_file():
        return False
    if hasattr(os, "getuid") and place.stat().st_uid != os.getuid():
        return False
    return {path.name for path in place.iterdir()} <= {MARK, WHOLE}


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete what processes that were killed left in a folder, of writing `name`, or of writing anything."""
    for place in folder.glob(f".{'*' if name is None else escape(name)}.*-*.saving"):
        writer = place.name.split(".")[-2].partition("-")[0]
        if writer.isdigit() and not psutil.pid_exists(int(writer)):
            clear_leftover(place)


def clear_leftover(place: Path) -> None:
    """Delete what a writer that is gone has left, if it is one's; an empty folder is one that was not marked yet."""
    if is_leftover(place):
        _delete_marked(place)
    elif STAGED.fullmatch(place.name):
        with suppress(OSError):  # it is not empty, or no folder
            place.rmdir()


def publish_directory(finished: Path, target: Path) -> None:
    """Flush all of `finished` to disk, then rename it to `target`; what was there goes once the new one is there."""
    _flush_all(finished)
    replaced = target.with_name(f".{target.name}.{secrets.token_hex(8)}.old")
    if os.path.lexists(target):
        target.rename(replaced)
    finished.rename(target)
    flush(target.parent)
    if os.path.lexists(replaced):
        discard(replaced)


def _delete_marked(place: Path) -> None:
    """Delete a folder that carries our mark, and that last: killed meanwhile, it is still known as ours."""
    delete(place / WHOLE)
    delete(place)


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
