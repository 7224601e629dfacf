"""Write, replace and delete files and directories atomically, and never through a link.

Directories may come from somebody else: unpacked from an archive, cloned, or shared with other users. So temporary
files have a fresh random name and must not exist yet, links are never followed, and only directories with our mark are
deleted.
"""

import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from glob import escape
from pathlib import Path

import psutil

from qlora_cli.errors import OutputDirectoryError

LEFTOVER = ".saving"  # left in a directory if the process that filled it was killed; the next one deletes it
MARK = "written-by-qlora"  # a file in a staging folder, next to what will be moved out of it
WHOLE = "whole"
REPLACED = "replaced"  # next to it: what was in the directory that is filled again
PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
USUAL_FILE = 0o666  # before the user's umask
STAGED = re.compile(r"\..+\.\d+-[0-9a-f]{16}\.saving")  # the names that `_staging_path` gives
UNFINISHED = re.compile(r"(\..+)?\.[0-9a-f]{16}\.saving")  # the names of files before they have their own
APPENDING = os.O_WRONLY | os.O_APPEND | os.O_CREAT


def write_file(target: Path, content: str | bytes, *, mode: int = USUAL_FILE) -> None:
    """Write a file under a temporary name, flush it to disk, and rename it; a link at `target` is replaced.

    `mode` is masked by the user's umask.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}.saving")
    try:
        with os.fdopen(_open(temporary, os.O_WRONLY | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def clear_unfinished_files(folder: Path) -> None:
    """Delete the files that killed processes left half written; no other process may be writing to `folder`."""
    for path in folder.iterdir():
        if UNFINISHED.fullmatch(path.name) and unsafe_reason(path) is None:
            path.unlink(missing_ok=True)


def append_line(file: Path, line: str, *, mode: int = PRIVATE_FILE) -> None:
    """Append a line to a file, which is created if it does not exist.

    Raises:
        OSError: it is a link, has another hard link, is not a regular file or another user's, or can't be written.
    """
    with os.fdopen(_open_in_place(file, APPENDING, mode), "a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def end_line(file: Path) -> None:
    """Terminate a last line that a killed process left unfinished.

    Raises:
        OSError: it is a link, has another hard link, is not a regular file or another user's, or can't be written.
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
    """Return why it is unsafe to write into, or read from, a file with a name of ours; None if it is safe."""
    return _unsafe_stat_reason(file.lstat(), file.parent)


def _unsafe_stat_reason(status: os.stat_result, folder: Path) -> str | None:
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    if not stat.S_ISREG(status.st_mode):
        return "is no file"
    if status.st_nlink > 1:
        return "has another name, by which something else would be changed"
    return None if is_owned_by_user(status, folder) else f"belongs to another user (uid {status.st_uid})"


def is_owned_by_user(status: os.stat_result, folder: Path) -> bool:
    """Return whether a file in a folder is this user's, or has the owner of all files that this user creates there.

    A network disk, or one that is mounted for others, may assign an owner of its own to every file.
    """
    return not hasattr(os, "getuid") or status.st_uid == os.getuid() or status.st_uid == _owner_of_new(folder)


def _owner_of_new(folder: Path) -> int | None:
    new = folder / f".{secrets.token_hex(8)}.saving"
    try:
        owner = private_file(new).stat().st_uid
        new.unlink()
    except OSError:  # nothing can be created there
        return None
    return owner


def _open_in_place(file: Path, flags: int, mode: int = PRIVATE_FILE) -> int:
    if os.path.lexists(file) and (reason := unsafe_reason(file)):
        raise PermissionError(f"{file} {reason}")
    # Checked again once it is open, because it may have been replaced; O_NONBLOCK, because opening a pipe would block.
    descriptor = os.open(file, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, mode)
    if reason := _unsafe_stat_reason(os.fstat(descriptor), file.parent):
        os.close(descriptor)
        raise PermissionError(f"{file} {reason}")
    return descriptor


def _open(file: Path, flags: int, mode: int) -> int:
    return os.open(file, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode)


def private_folder(folder: Path) -> Path:
    """Create a folder that only its owner can access, unless it exists; return it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
    return folder


def private_file(file: Path) -> Path:
    """Create an empty file that only its owner can read, unless the path exists; return it."""
    if not os.path.lexists(file):
        os.close(_open(file, os.O_WRONLY | os.O_EXCL, PRIVATE_FILE))
    return file


def copy_file(source: Path, target: Path) -> None:
    """Copy a file of a model; a link may only lead to a file in the same directory, or to the blobs of its cache.

    Raises:
        OSError: it is a link out of its directory.
    """
    if escapes_directory(source):
        end = resolve_links(source) or "itself"
        raise PermissionError(f"{source} is a link out of its directory, to {end}: it is not followed")
    shutil.copyfile(source.resolve(), target)


def escapes_directory(file: Path) -> bool:
    """Return whether a file is a link that leads neither into its directory nor to the blobs of the hub's cache."""
    directory, real = file.parent.resolve(), resolve_links(file)
    if real is None:
        return True
    # A snapshot in that cache is a folder of links.
    blobs = [directory.parent.parent / "blobs"] if directory.parent.name == "snapshots" else []
    return not any(real.is_relative_to(folder) for folder in (directory, *blobs))


def resolve_links(file: Path) -> Path | None:
    """Return a path with all links resolved; None if they form a loop."""
    try:
        return file.resolve()
    except (OSError, RuntimeError):  # RuntimeError up to Python 3.12
        return None


def copy_folder(source: Path, target: Path) -> None:
    """Copy the content of a folder into `target`, without links.

    Raises:
        OSError: it can't be read or written.
    """

    def links(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if (Path(folder) / name).is_symlink()]

    shutil.copytree(source, target, dirs_exist_ok=True, ignore=links)


def write_directory(target: Path, fill: Callable[[Path], None], *, may_replace: bool = True) -> None:
    """Let `fill` write into a folder next to `target`, flush it to disk, and rename it to `target`.

    An existing `target` is deleted once the new one is in place, if it may be replaced.

    Raises:
        OutputDirectoryError: it may not be replaced, and another process created it meanwhile.
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
        f"another process wrote to {target} at the same time", hint="Choose another --output, and try again."
    )


def fill_directory(target: Path, fill: Callable[[Path], None], replaced: Collection[str] = ()) -> None:
    """Let `fill` write the content of `target`, which does not exist or holds only `replaced`: all of it or nothing.

    An empty directory is filled, not replaced, because it may be a working directory, a mount point or behind a link.
    `config.json`, without which a directory is not a model, is moved last: a process that is killed in between leaves
    no model. What is `replaced` is deleted once all the rest is in place.
    """
    if not target.is_dir():
        write_directory(target, fill, may_replace=False)
        return
    inside = target / LEFTOVER
    if is_leftover(inside):
        _delete_marked(inside)
    with _staging_folder(inside) as whole:
        fill(whole)
        _flush_all(whole)
        _exchange(target, whole, replaced)
        flush(target)


def _exchange(target: Path, whole: Path, replaced: Collection[str]) -> None:
    """Move what is `replaced` out of `target`, and the content of `whole` into it; undo both if one fails."""
    old = whole.with_name(REPLACED)
    old.mkdir()
    moved: list[tuple[Path, Path]] = []
    outward = [(target / name, old / name) for name in sorted(replaced, key=lambda name: name != "config.json")]
    inward = sorted(whole.iterdir(), key=lambda path: path.name == "config.json")
    try:
        for source, end in (*outward, *((path, target / path.name) for path in inward)):
            if os.path.lexists(end):
                raise _filled_concurrently(target)
            source.rename(end)
            moved.append((source, end))
    except BaseException:
        for source, end in reversed(moved):
            end.rename(source)
        raise


def staging(target: Path) -> AbstractContextManager[Path]:
    """Yield a folder next to `target` to write into, with an unpredictable name; it is deleted at the end."""
    return _staging_folder(_staging_path(target))


def _staging_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(8)}.saving")


@contextmanager
def _staging_folder(path: Path) -> Iterator[Path]:
    """Create `path` with our mark, yield a folder in it, and delete it; on an error also parents created for it."""
    created = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=PRIVATE_FOLDER)  # an error if it exists, also as a link
    try:
        (path / MARK).touch()
        whole = path / WHOLE
        whole.mkdir()
        yield whole
    except BaseException:
        _delete_marked(path)
        for parent in created:
            with suppress(OSError):  # no longer empty
                parent.rmdir()
        raise
    _delete_marked(path)


def discard(folder: Path) -> None:
    """Delete a folder of ours: it disappears at once, and what a killed process leaves of it has our mark.

    Raises:
        OSError: it can't be moved.
    """
    staged = _staging_path(folder)
    staged.mkdir(mode=PRIVATE_FOLDER)
    (staged / MARK).touch()
    try:
        folder.rename(staged / WHOLE)
    finally:
        _delete_marked(staged)


def move_aside(path: Path, name: str) -> Path:
    """Rename a file or folder within its directory, to `name` or, if that exists, a similar one; return its path."""
    aside = path.with_name(name)
    if os.path.lexists(aside):
        aside = path.with_name(f"{name}-{secrets.token_hex(4)}")
    return path.rename(aside)


def is_leftover(folder: Path) -> bool:
    """Return whether a killed process of this user left a folder: not a link, with our mark, and nothing foreign."""
    if folder.is_symlink() or not (folder / MARK).is_file():
        return False
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        return False
    return {path.name for path in folder.iterdir()} <= {MARK, WHOLE, REPLACED}


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete what killed processes left in a folder when they wrote `name`, or anything."""
    for path in folder.glob(f".{'*' if name is None else escape(name)}.*-*.saving"):
        writer = path.name.split(".")[-2].partition("-")[0]
        if writer.isdigit() and not psutil.pid_exists(int(writer)):
            clear_leftover(path)


def clear_leftover(folder: Path) -> None:
    """Delete a staging folder whose writer is gone; an empty one was not marked yet."""
    if is_leftover(folder):
        _delete_marked(folder)
    elif STAGED.fullmatch(folder.name):
        with suppress(OSError):  # not empty, or not a folder
            folder.rmdir()


def publish_directory(finished: Path, target: Path) -> None:
    """Flush all of `finished` to disk, then rename it to `target`; an existing `target` is deleted after that."""
    _flush_all(finished)
    replaced = target.with_name(f".{target.name}.{secrets.token_hex(8)}.old")
    if os.path.lexists(target):
        target.rename(replaced)
    finished.rename(target)
    flush(target.parent)
    if os.path.lexists(replaced):
        discard(replaced)


def _delete_marked(folder: Path) -> None:
    """Delete a folder with our mark; the mark goes last, so that an interrupted deletion can be completed."""
    delete(folder / WHOLE)
    delete(folder)


def delete(path: Path) -> None:
    """Delete a file, or a folder with its content, if it exists; of a link, never its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink(missing_ok=True)


def _flush_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            flush(path)


def flush(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
