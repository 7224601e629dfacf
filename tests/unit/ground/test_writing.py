"""Writing, replacing and deleting: whole or not at all, never through a link, and only our own files."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from qlora_cli import writing
from qlora_cli.errors import OutputDirectoryError
from qlora_cli.files import check_output_directory
from qlora_cli.writing import (
    LEFTOVER,
    MARK,
    WHOLE,
    append_line,
    clear_leftovers,
    copy_file,
    copy_folder,
    delete,
    discard,
    end_line,
    fill_directory,
    move_aside,
    private_file,
    private_folder,
    resolve_links,
    staging,
    write_directory,
    write_file,
)

DEAD = 4_999_999  # beyond the largest number that a process has


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_replaced_and_its_target_is_untouched(tmp_path: Path, exists: bool) -> None:
    elsewhere, target = tmp_path / "elsewhere", tmp_path / "here" / "adapter"
    target.parent.mkdir()
    target.symlink_to(elsewhere)
    if exists:
        elsewhere.mkdir()
        (elsewhere / "file").touch()
    write_directory(target, lambda path: (path / "new").touch())
    assert not target.is_symlink()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in target.parent.iterdir()] == ["adapter"]
    assert (elsewhere / "file").exists() == exists


def test_an_empty_directory_is_filled_in_place_and_stays_empty_on_failure(tmp_path: Path) -> None:
    """A replacement would be invisible to a shell whose directory it is, and would not be on a disk mounted there."""
    target = tmp_path / "target"
    target.mkdir()
    inode = target.stat().st_ino

    def fill(path: Path) -> None:
        (path / "folder").mkdir()
        (path / "folder" / "file").write_text("whole")
        (path / "config.json").write_text("{}")

    def fail(path: Path) -> None:
        fill(path)
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        fill_directory(target, fail)
    assert list(target.iterdir()) == []
    fill_directory(target, fill)
    assert target.stat().st_ino == inode
    assert {path.relative_to(target).as_posix() for path in target.rglob("*")} == {
        *("folder", "folder/file", "config.json"),
    }


FILL = """
import os, sys
from pathlib import Path
from qlora_cli.writing import fill_directory

def fill(path):
    for name in ("a.txt", "config.json"):
        (path / name).write_text("half")

renamed = []
rename = Path.rename
def rename_and_die(path, target):
    renamed.append(path)
    if len(renamed) == int(sys.argv[2]):
        os._exit(9)
    return rename(path, target)

Path.rename = rename_and_die
fill_directory(Path(sys.argv[1]), fill)
"""


def killed(target: Path, at: int) -> None:
    """Fill `target` in a process that dies when it moves the file `at`."""
    died = subprocess.run([sys.executable, "-c", FILL, target, str(at)], check=False)
    assert died.returncode == 9


def test_leftovers_of_a_killed_process_are_not_content_and_are_deleted(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    killed(target, 1)
    assert [path.name for path in target.iterdir()] == [LEFTOVER]
    assert check_output_directory(target) is None
    fill_directory(target, lambda path: (path / "config.json").touch())
    assert [path.name for path in target.iterdir()] == ["config.json"]


def test_files_moved_before_a_process_was_killed_stay_and_are_not_a_model(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    killed(target, 2)
    assert not (target / "config.json").exists()
    problem = check_output_directory(target)
    assert problem is not None
    assert "contains other files (a.txt)" in str(problem)
    assert "was not finished" in str(problem.hint)
    assert (target / "a.txt").read_text() == "half"


def test_a_folder_with_the_name_of_a_leftover_stays_unless_it_is_ours(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / MARK).touch()
    for name, held in {"link": None, "unmarked": (), "more in it": (MARK, "thesis")}.items():
        target = tmp_path / name
        target.mkdir()
        if held is None:
            (target / LEFTOVER).symlink_to(elsewhere)
        else:
            (target / LEFTOVER).mkdir()
            for file in held:
                (target / LEFTOVER / file).touch()
        assert "contains other files" in str(check_output_directory(target)), name
        with pytest.raises(FileExistsError):
            fill_directory(target, lambda path: (path / "config.json").touch())
        assert os.path.lexists(target / LEFTOVER), name
    assert (elsewhere / MARK).exists()


def test_our_leftovers_next_to_the_target_are_cleared_if_their_writer_is_dead(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    gone = int(dead.stdout)
    writers = (("a", gone), ("b", os.getpid()), ("c", gone))
    ours, alive, unmarked = (tmp_path / f".out.{pid}-{name}.saving" for name, pid in writers)
    for place in (ours, alive, unmarked):
        place.mkdir()
    for place in (ours, alive):
        (place / MARK).touch()
    (unmarked / "thesis").touch()
    write_directory(tmp_path / "out", lambda path: (path / "file").touch())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive.name, unmarked.name, "out"])
    (tmp_path / f".else.{gone}-d.saving").mkdir()
    (tmp_path / f".else.{gone}-d.saving" / MARK).touch()
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive.name, unmarked.name, "out"])


def test_an_interrupt_while_files_are_moved_leaves_the_directory_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "out", Path.rename
    target.mkdir()

    def interrupted(path: Path, place: Path) -> Path:
        if path.name == "config.json":
            raise KeyboardInterrupt
        return rename(path, place)

    def fill(path: Path) -> None:
        for name in ("a.txt", "config.json"):
            (path / name).write_text("half")

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill_directory(target, fill)
    assert list(target.iterdir()) == []


def test_parents_made_for_a_failed_write_are_removed(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_directory(tmp_path / "a" / "b" / "out", fail)
    assert list(tmp_path.iterdir()) == []


# ---- links


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A file of the user in another directory."""
    path = tmp_path / "home" / "bashrc"
    path.parent.mkdir()
    path.write_text("precious")
    return path


def test_a_file_replaces_a_link_through_an_unpredictable_temporary_name(tmp_path: Path, precious: Path) -> None:
    place = tmp_path / "run"
    place.mkdir()
    for name in ("run.json", ".run.json.saving", f".run.json.{os.getpid()}.saving"):
        (place / name).symlink_to(precious)
    write_file(place / "run.json", "{}")
    assert precious.read_text() == "precious"
    assert (place / "run.json").read_text() == "{}"
    assert not (place / "run.json").is_symlink()
    assert len(list(place.iterdir())) == 3


def test_nothing_is_appended_through_a_link(tmp_path: Path, precious: Path) -> None:
    link = tmp_path / "metrics.jsonl"
    link.symlink_to(precious)
    with pytest.raises(OSError, match="is a link"):
        append_line(link, "{}")
    with pytest.raises(OSError, match="is a link"):
        end_line(link)
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("kind", ["another name", "no file"])
def test_nothing_is_appended_to_a_pipe_or_a_hard_link(tmp_path: Path, precious: Path, kind: str) -> None:
    file = tmp_path / "metrics.jsonl"
    if kind == "no file":
        os.mkfifo(file)
    else:
        file.hardlink_to(precious)
    with pytest.raises(PermissionError, match=kind):
        append_line(file, "{}")
    with pytest.raises(PermissionError, match=kind):
        end_line(file)
    assert precious.read_text() == "precious"


def give_away(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a file to another user; without that permission, become another user instead."""
    if os.getuid() == 0:
        os.chown(file, 54321, -1)
    else:
        other = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: other)
        monkeypatch.setattr(writing, "_owner_of_new", lambda _: other)


def test_nothing_is_appended_to_a_file_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("theirs, cut")
    give_away(file, monkeypatch)
    with pytest.raises(PermissionError, match=r"metrics\.jsonl belongs to another user \(uid \d+\)"):
        append_line(file, "{}")
    with pytest.raises(PermissionError, match="belongs to another user"):
        end_line(file)
    assert file.read_text() == "theirs, cut"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_disk_where_all_files_have_one_owner_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    for line in ("one", "two"):
        append_line(tmp_path / "lines", line)
    end_line(tmp_path / "lines")
    assert (tmp_path / "lines").read_text() == "one\ntwo\n"
    assert [path.name for path in tmp_path.iterdir()] == ["lines"]


def test_a_system_without_users_has_no_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "getuid")
    append_line(tmp_path / "lines", "one")
    end_line(tmp_path / "lines")
    (tmp_path / LEFTOVER).mkdir()
    (tmp_path / LEFTOVER / MARK).touch()
    assert writing.is_leftover(tmp_path / LEFTOVER)
    assert (tmp_path / "lines").read_text() == "one\n"


@pytest.mark.parametrize("kind", ["a link", "no file", "another name", "another user's"])
def test_a_replacement_of_a_file_during_opening_is_not_written_to(
    tmp_path: Path, precious: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    file, opened = tmp_path / "metrics.jsonl", os.open
    file.write_text("ours")

    def swapped(path: str | Path, *rest: int) -> int:
        file.unlink()
        if kind == "a link":
            file.symlink_to(precious)
        elif kind == "no file":
            os.mkfifo(file)
        elif kind == "another name":
            file.hardlink_to(precious)
        else:
            file.write_text("theirs")
            give_away(file, monkeypatch)
        return opened(path, *rest)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        append_line(file, "{}")
    monkeypatch.undo()
    assert precious.read_text() == "precious"
    assert kind != "another user's" or file.read_text() == "theirs"


@pytest.mark.parametrize("came", ["a folder with something in it", "a file", "a name in an empty folder"])
def test_files_written_to_the_target_meanwhile_stay(tmp_path: Path, came: str) -> None:
    target = tmp_path / "out"
    if came == "a name in an empty folder":
        target.mkdir()

    def fill(path: Path) -> None:
        (path / "config.json").write_text("ours")
        if came == "a file":
            target.write_text("mine")
        else:
            target.mkdir(exist_ok=True)
            (target / "config.json").write_text("mine")

    with pytest.raises(OutputDirectoryError, match="at the same time") as caught:
        fill_directory(target, fill)
    assert caught.value.hint
    assert (target if came == "a file" else target / "config.json").read_text() == "mine"
    assert [path.name for path in tmp_path.rglob("*")] == (["out"] if came == "a file" else ["out", "config.json"])


def test_each_appended_line_is_separate(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    end_line(file)
    append_line(file, "one")
    with file.open("a") as stream:
        stream.write("cut")
    end_line(file)
    append_line(file, "two")
    assert file.read_text() == "one\ncut\ntwo\n"


def test_deleting_never_follows_links(tmp_path: Path, precious: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(precious.parent)
    (tmp_path / "link").symlink_to(precious.parent)
    for place in (folder, tmp_path / "link", tmp_path / "none"):
        delete(place)
        assert not os.path.lexists(place)
    assert precious.read_text() == "precious"


def test_discarding_removes_a_folder_and_its_temporary_names_but_no_link_targets(
    tmp_path: Path, precious: Path
) -> None:
    folder = tmp_path / "out" / "folder"
    (folder / "more").mkdir(parents=True)
    (folder / "link").symlink_to(precious.parent)
    discard(folder)
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(FileNotFoundError):
        discard(folder)
    assert list((tmp_path / "out").iterdir()) == []
    assert precious.read_text() == "precious"


def a_folder(target: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (target / name).write_text("half")
    (target / "more").mkdir(parents=True)
    (target / "more" / "d.txt").write_text("half")


def fails_after_filling(target: Path) -> None:
    with suppress(ValueError), staging(target) as whole:
        a_folder(whole)
        raise ValueError


def discards(target: Path) -> None:
    target.mkdir()
    a_folder(target)
    discard(target)


def replaces(target: Path) -> None:
    write_directory(target, a_folder)
    write_directory(target, a_folder)


def clears(target: Path) -> None:
    place = target.with_name(f".{target.name}.{DEAD}-{'0' * 16}.saving")
    (place / WHOLE).mkdir(parents=True)
    (place / MARK).touch()
    a_folder(place / WHOLE)
    clear_leftovers(target.parent)


def killed_at(deletion: int, deletes: Callable[[Path], None], target: Path) -> bool:
    """Run `deletes` in a process that dies at deleting system call number `deletion`; return whether it died."""
    if (pid := os.fork()) == 0:
        left = iter(range(deletion))

        def dies(event: str, _: object) -> None:
            if event in {"os.remove", "os.rmdir"} and next(left, None) is None:
                os._exit(9)

        sys.addaudithook(dies)
        deletes(target)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


@pytest.mark.slow
@pytest.mark.parametrize("deletes", [fails_after_filling, discards, replaces, clears])
def test_leftovers_of_a_process_killed_while_deleting_are_cleared_by_the_next(
    tmp_path: Path, deletes: Callable[[Path], None]
) -> None:
    for deletion in count():
        place = tmp_path / str(deletion)
        place.mkdir()
        if not killed_at(deletion, deletes, place / "target"):
            break
        clear_leftovers(place)
        assert {path.name for path in place.iterdir()} <= {"target"}, deletion
    assert deletion >= 5


def test_moving_aside_replaces_nothing(tmp_path: Path) -> None:
    for content in ("one", "two"):
        (tmp_path / "file").write_text(content)
        move_aside(tmp_path / "file", "old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "old-folder").mkdir()  # which a renamed folder would replace
    assert move_aside(tmp_path / "folder", "old-folder").name.startswith("old-folder-")
    assert (tmp_path / "old").read_text() == "one"
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("target", ["LICENSE", "other"])
def test_a_circular_link_is_not_followed(tmp_path: Path, target: str) -> None:
    (tmp_path / "LICENSE").symlink_to(target)
    (tmp_path / "other").symlink_to("LICENSE")
    assert resolve_links(tmp_path / "LICENSE") in {None, tmp_path / "LICENSE"}  # the latter from Python 3.13 on
    with pytest.raises(OSError, match="LICENSE"):
        copy_file(tmp_path / "LICENSE", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_link_out_of_its_directory_is_not_copied_except_in_a_snapshot(tmp_path: Path, precious: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "LICENSE").symlink_to(precious)
    with pytest.raises(PermissionError, match="link out of its directory"):
        copy_file(model / "LICENSE", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    snapshot, blob = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs" / "123"
    snapshot.mkdir(parents=True)
    blob.parent.mkdir()
    blob.write_text("license")
    (snapshot / "LICENSE").symlink_to(blob)
    copy_file(snapshot / "LICENSE", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "license"


def test_deleting_does_not_wait_for_a_pipe_or_fail_on_a_missing_path(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "pipe")
    for name in ("pipe", "folder", "nothing"):
        delete(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    delete(tmp_path / "file" / "in it")
    assert (tmp_path / "file").exists()


def test_links_in_a_copied_folder_are_omitted(tmp_path: Path, precious: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "weights").write_text("w")
    (folder / "link").symlink_to(precious)
    (tmp_path / "copy").mkdir()
    copy_folder(folder, tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["weights"]


def test_private_files_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "a" / "cache")
    append_line(folder / "lines", "x")
    write_file(folder / "file", b"x", mode=0o600)
    assert private_file(private_file(folder / "empty")).read_bytes() == b""
    modes = [path.stat().st_mode & 0o777 for path in (folder, *sorted(folder.iterdir()))]
    assert modes == [0o700, 0o600, 0o600, 0o600]
