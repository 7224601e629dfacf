"""A predicted peak is written to a file, and a later prediction is compared with it."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from qlora_cli.cli.app import app

ASKED = ("--max-length", "64", "--gpu", "RTX 4090", "--gradient-checkpointing", "on", "--quant", "nf4")


@pytest.fixture
def model(base_model: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    shutil.copy(base_model / "config.json", directory)
    return directory


def inspect(model: Path, *flags: str | Path) -> Result:
    return CliRunner().invoke(app, ["inspect-memory", *map(str, (model, *ASKED, *flags))])


@pytest.fixture
def lock(model: Path, tmp_path: Path) -> Path:
    file = tmp_path / "memory.lock"
    done = inspect(model, "--write-lock", file)
    assert done.exit_code == 0, done.stderr
    return file


def test_the_same_prediction_passes_wherever_the_model_lies(model: Path, lock: Path, tmp_path: Path) -> None:
    assert str(tmp_path) not in lock.read_text()
    elsewhere = shutil.copytree(model, tmp_path / "other" / "model")
    done = inspect(elsewhere, "--check", lock, "--json")
    assert done.exit_code == 0, done.stderr
    check = json.loads(done.stdout)["check"]
    assert (check["change"], check["passed"], check["changed_settings"]) == (0, True, [])


def test_a_peak_that_moved_up_or_down_fails_unless_that_much_is_allowed(model: Path, lock: Path) -> None:
    done = inspect(model, "--check", lock, "--rank", "64", "--json")
    assert done.exit_code == 1
    check = json.loads(done.stdout)["check"]
    assert check["predicted_bytes"] > check["locked_bytes"]
    assert check["change"] == pytest.approx(check["predicted_bytes"] / check["locked_bytes"] - 1)
    assert check["changed_settings"] == [{"setting": "rank", "before": "16", "now": "64"}]
    assert "failed: the predicted peak moved by +" in done.stderr
    assert inspect(model, "--check", lock, "--rank", "64", "--max-change", str(check["change"] + 1e-6)).exit_code == 0
    inspect(model, "--write-lock", lock, "--rank", "64")
    down = inspect(model, "--check", lock)
    assert down.exit_code == 1
    assert "rank is 16, and was 64" in down.stdout


def test_what_can_not_be_compared_is_an_error(model: Path, lock: Path, tmp_path: Path) -> None:
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        (("--check", tmp_path / "none.lock"), "there is no"),
        (("--check", model / "config.json"), "is no lock of a predicted peak"),
        (("--check", lock, "--write-lock", tmp_path / "two.lock"), "compared with itself"),
        (("--max-change", "0.5"), "no effect without --check"),
        (("--write-lock", tmp_path), "is a directory"),
        (("--write-lock", tmp_path / "no" / "memory.lock"), "there is no directory"),
    ]
    for flags, words in cases:
        done = inspect(model, *flags)
        assert done.exit_code == 2, flags
        assert words in done.stderr.replace("\n", " "), flags
    other = CliRunner().invoke(
        app, ["inspect-memory", str(model), *ASKED[:2], "--gpu", "RTX 3090", "--check", str(lock)]
    )
    assert other.exit_code == 2
    assert "is of the GPU RTX 4090, and RTX 3090 is asked for" in other.stderr.replace("\n", " ")
