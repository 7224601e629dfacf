"""Impossible paths, and directories that can't be written to."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_cli.data.finding.sources import check_dataset_name
from qlora_cli.data.showing.page_file import check_page
from qlora_cli.errors import QloraError
from qlora_cli.files import SMALL, check_output_directory, existing_path, read_small
from qlora_cli.runs.directory import check_free_directory
from qlora_cli.settings.models import OutputSettings
from qlora_cli.training.resuming.resume import output_problem
from qlora_cli.writing import write_directory

IMPOSSIBLE = ["~nosuchuser/x", "a" * 5000, "./" + "a" * 5000, "a\0b"]


def run_problem(directory: Path) -> QloraError | None:
    return output_problem(OutputSettings(directory=directory))


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_impossible_name_is_not_an_existing_path(name: str) -> None:
    assert existing_path(name) is None


def test_a_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert existing_path("~") == tmp_path
    assert existing_path("~/none") is None


@pytest.mark.parametrize("name", ["~nosuchuser/x", "a" * 5000, "./" + "a" * 5000, "a" * 5000 + ".jsonl"])
def test_a_data_set_with_an_invalid_path_does_not_exist(name: str) -> None:
    assert "no such file" in str(check_dataset_name(name))


@pytest.mark.parametrize("name", ["a" * 5000, "./" + "a/" * 5000])
def test_an_impossible_output_directory_is_refused(name: str) -> None:
    problem = check_output_directory(Path(name), "--save")
    assert "can't be used: File name too long" in str(problem)
    assert problem is not None
    assert problem.hint == "Choose another --save."


@pytest.mark.parametrize("find", [check_output_directory, check_free_directory, run_problem])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a" * 300, "File name too long"),
        ("none/" + "a" * 300, "File name too long"),
        ("none/" + "a" * 230, "File name too long"),  # the temporary file next to it has a longer name
        ("none/" + "é" * 120, "File name too long"),
        ("none" + "/a" * 2000, "File name too long"),
        ("a\0b", "NUL"),
        ("file", "file is a file"),
        ("file/run", "file is a file"),
        ("file/run/again", "file is a file"),
        ("link", "link is a broken link"),
        ("link/run", "link is a broken link"),
        ("loop", "Too many levels of symbolic links"),
        ("loop/run", "Too many levels of symbolic links"),
    ],
)
def test_a_directory_that_cannot_be_made_is_reported_before_making_it(
    tmp_path: Path, find: Callable[[Path], QloraError | None], name: str, why: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to("loop")
    directory = tmp_path / name
    problem = find(directory)
    assert problem is not None
    assert why in str(problem)
    assert problem.exit_code == 2
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", [*IMPOSSIBLE, "loop", "none"])
def test_a_checkpoint_with_an_invalid_path_does_not_exist(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    asked = OutputSettings(directory=tmp_path / "run", resume=f"{tmp_path}/{name}")
    assert "there is no checkpoint of a run in" in str(output_problem(asked))


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"])
def test_a_page_with_an_impossible_path_is_refused(name: str) -> None:
    assert re.search("File name too long|NUL", str(check_page(Path(name))))


def test_names_of_the_maximum_length_are_accepted(tmp_path: Path) -> None:
    directory = tmp_path / "none" / ("a" * 200)
    assert check_output_directory(directory) is None
    write_directory(directory, lambda folder: (folder / "file").touch())
    assert check_output_directory(tmp_path / "none" / "new") is None


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "none")
    assert "is a broken link" in str(check_output_directory(tmp_path / "link"))


def test_a_small_file_with_too_many_values_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b"[" + b"{}," * (SMALL.max_values // 2) + b"1]")
    with pytest.raises(ValueError, match="it holds more than 1,500,000 values"):
        read_small(file)
    file.write_bytes(b"[" + b"{}," * (SMALL.max_values // 2 - 1) + b"1]")
    assert len(read_small(file)) == file.stat().st_size
