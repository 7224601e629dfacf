"""Paths that can be none, and directories that are written whole or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_cli.data.sources import check_dataset_name
from qlora_cli.files import check_output_directory, existing_path
from qlora_cli.writing import LEFT_OVER, fill_directory, write_directory

IMPOSSIBLE = ["~nosuchuser/x", "a" * 5000, "./" + "a" * 5000, "a\0b"]


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_name_that_can_be_no_file_is_none(name: str) -> None:
    assert existing_path(name) is None


def test_a_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert existing_path("~") == tmp_path
    assert existing_path("~/none") is None


@pytest.mark.parametrize("name", ["~nosuchuser/x", "a" * 5000, "./" + "a" * 5000, "a" * 5000 + ".jsonl"])
def test_a_data_set_that_can_be_no_file_is_not_there(name: str) -> None:
    assert "no such file" in str(check_dataset_name(name))


@pytest.mark.parametrize("name", ["a" * 5000, "./" + "a/" * 5000])
def test_an_output_directory_that_can_be_none_is_refused(name: str) -> None:
    problem = check_output_directory(Path(name), "--save")
    assert "can't be used: File name too long" in str(problem)
    assert problem is not None
    assert problem.hint == "Choose another --save."


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "none")
    assert "is a link to nothing" in str(check_output_directory(tmp_path / "link"))


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_is_replaced_and_never_what_it_leads_to(tmp_path: Path, is_there: bool) -> None:
    elsewhere, target = tmp_path / "elsewhere", tmp_path / "here" / "adapter"
    target.parent.mkdir()
    target.symlink_to(elsewhere)
    if is_there:
        elsewhere.mkdir()
        (elsewhere / "kept").touch()
    write_directory(target, lambda path: (path / "new").touch())
    assert not target.is_symlink()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in target.parent.iterdir()] == ["adapter"]
    assert (elsewhere / "kept").exists() == is_there


def test_an_empty_directory_is_filled_where_it_is_and_stays_empty_on_failure(tmp_path: Path) -> None:
    """Another one in its place would not be there for a shell in it, nor on the disk that is mounted there."""
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


def test_what_a_killed_process_left_in_a_directory_is_no_content_and_goes(tmp_path: Path) -> None:
    def kill(path: Path) -> None:
        (path / "config.json").write_text("{}")
        raise SystemExit

    target = tmp_path / "target"
    target.mkdir()
    seen: list[str] = []

    def fill(path: Path) -> None:
        seen.append(path.relative_to(target).as_posix())
        (path / "config.json").write_text("{}")

    fill_directory(target, fill)
    (target / "config.json").unlink()
    left = target / seen[0]
    left.mkdir(parents=True)
    (left / "half").write_text("")
    assert check_output_directory(target) is None
    fill_directory(target, fill)
    assert [path.name for path in target.iterdir()] == ["config.json"]


FILL = """
import os, sys
from pathlib import Path
from qlora_cli.writing import fill_directory

def fill(path):
    (path / "a.txt").write_text("half")
    (path / "b").mkdir()
    (path / "b" / "c.txt").write_text("half")
    (path / "config.json").write_text("{}")

renamed = []
rename = Path.rename
def rename_and_die(path, target):
    if path.parent.name == "whole":
        renamed.append(path)
        if len(renamed) == int(sys.argv[2]):
            os._exit(9)
    return rename(path, target)

Path.rename = rename_and_die
fill_directory(Path(sys.argv[1]), fill)
"""


@pytest.mark.parametrize("dies_at", [1, 2, 3])
def test_what_a_killed_process_had_moved_into_an_empty_directory_is_taken_back_and_nothing_else(
    tmp_path: Path, dies_at: int
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    died = subprocess.run([sys.executable, "-c", FILL, target, str(dies_at)], check=False)
    assert died.returncode == 9
    assert not (target / "config.json").exists(), "it looks complete"
    assert len([path for path in target.iterdir() if path.name != LEFT_OVER]) == dies_at - 1
    assert check_output_directory(target) is None
    (target / "mine.txt").write_text("mine")
    assert "holds something else (mine.txt)" in str(check_output_directory(target))
    (target / "mine.txt").unlink()

    def fill(path: Path) -> None:
        (path / "config.json").write_text("new")

    fill_directory(target, fill)
    assert {path.name: path.read_text() for path in target.iterdir()} == {"config.json": "new"}


def test_a_file_of_the_user_by_a_name_that_was_being_moved_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    assert subprocess.run([sys.executable, "-c", FILL, target, "3"], check=False).returncode == 9
    (target / "a.txt").rename(tmp_path / "elsewhere.txt")
    (target / "a.txt").write_text("mine")
    assert "holds something else (a.txt)" in str(check_output_directory(target))


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


def test_parents_that_were_made_for_what_failed_are_gone(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_directory(tmp_path / "a" / "b" / "out", fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_empty", [True, False])
def test_what_was_moved_as_a_whole_before_the_process_was_killed_stays(tmp_path: Path, is_empty: bool) -> None:
    (tmp_path / LEFT_OVER).mkdir()
    if is_empty:  # else the clearing up had begun
        (tmp_path / LEFT_OVER / "whole").mkdir()
    (tmp_path / "config.json").write_text("{}")
    inode = (tmp_path / "config.json").stat().st_ino
    (tmp_path / LEFT_OVER / "moved.json").write_text(f'{{"config.json": {inode}}}')
    assert "holds something else (config.json)" in str(check_output_directory(tmp_path))
