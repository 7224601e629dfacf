"""Paths that can be none, and directories that can't be written to."""

from pathlib import Path

import pytest

from qlora_cli.data.sources import check_dataset_name
from qlora_cli.files import check_output_directory, existing_path

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
