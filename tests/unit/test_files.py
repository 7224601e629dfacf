"""Paths that can be none, and directories that are written whole or not at all."""

from pathlib import Path

import pytest

from qlora_cli.data.sources import check_dataset_name
from qlora_cli.files import check_output_directory, existing_path, fill_directory

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
