"""The walk of CONTRIBUTING.md, "a training setting": one line in one file, and every table knows it.

The package is copied, one field is added to the section `training`, and nothing else is touched.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
FIELD = """
    surprise_ratio: Annotated[
        float,
        Marks(
            flag="--surprise-ratio",
            commands=(Command.TRAIN, Command.INSPECT_DATA),
            affects_memory=True,
            on_resume=OnResume.FREE,
            effective_with=EffectiveWith(key="schedule", values=(Schedule.LINEAR,), why="only lines surprise"),
        ),
    ] = Field(default=0.25, ge=0, lt=1, description="Share of the steps that surprise.")
    plain_surprise: int = Field(default=3, description="A number without marks.")
"""
# Run in the copied package: everything that is derived from the settings, as one object.
ASK = """
import json
from pathlib import Path
from types import SimpleNamespace
from typer.testing import CliRunner
import typer.main
import make_reference
from qlora_cli.cli.app import app
from qlora_cli.settings.models import TrainSettings, all_settings, json_schema, marks
from qlora_cli.settings.resolve import Sources, resolve
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.runs.record import RunRecord
from qlora_cli.training.resume import Resume, check_changes
from qlora_cli.errors import SettingsError

commands = typer.main.get_command(app).commands
takes = [n for n, c in commands.items() if any("--surprise-ratio" in p.opts for p in c.params)]
run = lambda *arguments: CliRunner().invoke(app, list(arguments))
shown = run("config", "show", "--json", "--schedule", "linear", "--surprise-ratio", "0.5")
refused = run("train", "--model", "m", "--dataset", "d", "--output", "o", "--surprise-ratio", "0.5")
wrong = run("train", "--model", "m", "--dataset", "d", "--output", "o", "--surprise-ratio", "2")

flags = {"model.name": "m", "data.dataset": "d", "output.directory": "o", "training.schedule": "linear"}
def settings(**more):
    given = {**flags, **{f"training.{key}": value for key, value in more.items()}}
    return resolve(Sources(flags={path: (path, value) for path, value in given.items()}), TrainSettings).settings
record = RunRecord(settings=settings().model_dump(mode="json"), status="done")
def resumed(**more):
    resume = Resume(run=RunDirectory(Path("o")), record=record, checkpoint=None, damaged=())
    try:
        return check_changes(resume, settings(**more), trains_given_adapter=False)
    except SettingsError as error:
        return f"refused: {error.problems[0].where}"
print(json.dumps({
    "takes": takes,
    "help": " ".join(run("train", "--help").output.split()),
    "shown": json.loads(shown.stdout)["training.surprise_ratio"],
    "refused": refused.output,
    "wrong": wrong.output,
    "schema": json_schema()["$defs"]["TrainingSettings"]["properties"]["surprise_ratio"],
    "page": make_reference.settings_page(),
    "memory": marks("training.surprise_ratio").affects_memory,
    "free": resumed(surprise_ratio="0.5"),
    "same": resumed(plain_surprise="4"),
}))
"""


@pytest.fixture(scope="module")
def derived(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what is derived from the settings of a copy in which one file has one field more."""
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "qlora_cli", copy / "qlora_cli", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copytree(ROOT / "scripts", copy / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    section = copy / "qlora_cli" / "settings" / "sections" / "training.py"
    source = section.read_text(encoding="utf-8")
    assert source.count("class TrainingSettings(Section):") == 1
    section.write_text(
        source.replace(
            "from qlora_cli.settings.marks import",
            "from qlora_cli.settings.marks import Command  # noqa\nfrom qlora_cli.settings.marks import",
        ).rstrip("\n")
        + FIELD,
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(copy), str(copy / "scripts")])}
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_the_commands_that_it_names_take_the_flag_with_its_help(derived: dict[str, Any]) -> None:
    assert sorted(derived["takes"]) == ["inspect-data", "inspect-memory", "train"]
    assert "--surprise-ratio NUMBER Share of the steps that surprise. [default: 0.25]" in derived["help"]


def test_it_is_shown_with_its_origin_and_is_in_the_schema(derived: dict[str, Any]) -> None:
    assert derived["shown"] == {"value": 0.5, "origin": "--surprise-ratio"}
    assert derived["schema"]["default"] == 0.25
    assert derived["schema"]["description"] == "Share of the steps that surprise."


def test_it_is_in_the_reference(derived: dict[str, Any]) -> None:
    row = "| `surprise_ratio` | `--surprise-ratio` | number ≥ 0, < 1 | `0.25` | Share of the steps that surprise. |"
    assert row in derived["page"]
    assert "| `plain_surprise` |  | whole number | `3` | A number without marks. |" in derived["page"]


def test_its_bounds_and_what_it_needs_are_checked(derived: dict[str, Any]) -> None:
    assert "--surprise-ratio: must be less than 1, got '2'" in derived["wrong"]
    message = "training.surprise_ratio has no effect with --schedule cosine: only lines surprise"
    assert message in derived["refused"]
    assert "Leave it out, or use --schedule linear." in derived["refused"]


def test_what_goes_by_memory_and_by_a_run_that_goes_on_knows_it(derived: dict[str, Any]) -> None:
    assert derived["memory"] is True
    assert derived["free"] == ["training.surprise_ratio: 0.25 before, 0.5 now"]
    assert derived["same"] == "refused: training.plain_surprise"
