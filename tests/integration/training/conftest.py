"""A run that tests resume, trained once, and its state after it was killed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_cli.training.train_run import train
from tests.conftest import ASSETS, Recorder, train_settings
from tests.support.processes.killed_runs import EXACT, Copier, place_killed

KillAt = Callable[[int], None]


@pytest.fixture(scope="session")
def base_model(shallow_base: Path) -> Path:
    """The first layers of the bundled model: no test may change it."""
    return shallow_base


@pytest.fixture(scope="session")
def whole(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, on the rows that every test has in a file of its own."""
    directory = tmp_path_factory.mktemp("whole")
    rows, run = write_rows(directory), directory / "run"
    train(train_settings(base_model, rows, run, **EXACT), Copier(run, *range(1, 7), 10, 11))
    return run


@pytest.fixture(scope="session")
def default_run(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the settings of `train_settings`, on the rows that every test has: no test may change it."""
    directory = tmp_path_factory.mktemp("default")
    train(train_settings(base_model, write_rows(directory), directory / "run"), Recorder())
    return directory / "run"


def write_rows(directory: Path) -> Path:
    """Write the rows that every test has in a file of its own."""
    lines = (ASSETS / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:12]
    rows = directory / "rows.jsonl"
    rows.write_text("".join(lines), encoding="utf-8")
    return rows


@pytest.fixture
def kill_at(whole: Path, tmp_path: Path) -> KillAt:
    """Leave `run`, trained with `EXACT` on the test's own rows, as if killed after the checkpoint of a step."""
    return lambda step: place_killed(whole, step, tmp_path / "run")
