"""The recipe of CONTRIBUTING.md, "Add a training setting": one line in one file, and every table knows it.

The package is copied, fields are added to the sections of a run, and nothing else is changed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
IMPORTS = "from qlora_cli.settings.setting_metadata import Command, EffectiveWith, Metadata, OnResume  # noqa\n"
OF_MEMORY = """
    surprise_size: Annotated[int, Metadata(affects_memory=True)] = Field(default=1, description="Affects memory.")
    plain_surprise: int = Field(default=3, description="A number without metadata.")
"""
OF_TRAINING = """
    surprise_ratio: Annotated[
        float,
        Metadata(
            flag="--surprise-ratio",
            commands=(Command.TRAIN, Command.INSPECT_DATA),
            affects_memory=True,
            on_resume=OnResume.FREE,
            effective_with=EffectiveWith(key="schedule", values=(Schedule.LINEAR,), why="only lines surprise"),
        ),
    ] = Field(default=0.25, ge=0, lt=1, description="Share of the steps that surprise.")
"""
OF_QUANTIZATION = """
    int8_surprise: Annotated[
        bool,
        Metadata(
            flag="--int8-surprise",
            commands=LOADERS,
            affects_memory=True,
            is_inherited=True,
            effective_with=OF_INT8,
        ),
    ] = Field(default=False, description="Surprise in 8 bit.")
"""
# Of the sections that a prediction goes by.
FIELDS = {
    "model": OF_MEMORY,
    "quantization": OF_MEMORY + OF_QUANTIZATION,
    "lora": OF_MEMORY,
    "data": OF_MEMORY,
    "training": OF_MEMORY + OF_TRAINING,
}
# Run in the copied package: everything that is derived from the settings, as one object.
ASK = """
import json
from pathlib import Path
from types import SimpleNamespace
from typer.testing import CliRunner
import typer.main
import make_reference
from qlora_cli.cli.app import app
from qlora_cli.memory.prediction_cache import key_of
from qlora_cli.memory.request import MemoryRequest
from qlora_cli.settings.models import InspectMemorySettings, QuantizationSettings, TrainSettings, json_schema
from qlora_cli.settings.settle import resolved_in_code, loading_settings
from qlora_cli.settings.display import display_flags
from qlora_cli.settings.resolve import Sources, resolve
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.runs.record import RunRecord
from qlora_cli.training.resuming.resume import Resume, check_changes
from qlora_cli.errors import SettingsError

commands = typer.main.get_command(app).commands
def takes(flag):
    return [n for n, c in commands.items() if any(flag in p.opts for p in c.params)]
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
def key(path, value):
    section, name = path.split(".")
    given = {"model": {"name": "m"}}
    given.setdefault(section, {})[name] = value
    return key_of(MemoryRequest(asked=resolved_in_code(InspectMemorySettings.model_validate(given))), {})
sections = ("model", "quantization", "lora", "data", "training")
asked = {f"{s}.{n}": (1, 2) for s in sections for n in ("surprise_size", "plain_surprise")}
asked |= {"training.surprise_ratio": (0.25, 0.5), "quantization.int8_surprise": (True, False)}
in_8_bit = QuantizationSettings.model_validate({"method": "int8", "int8_surprise": True})
print(json.dumps({
    "takes": takes("--surprise-ratio"),
    "quantization takes": takes("--int8-surprise"),
    "without 8 bit": run("load", "base", "--quant", "nf4", "--int8-surprise").output,
    "in effect": in_8_bit.in_effect(),
    "not in effect": QuantizationSettings().in_effect(),
    "flags": display_flags(in_8_bit),
    "of a run": loading_settings("quantization", {"int8_surprise": True, "plain_surprise": 4}),
    "help": " ".join(run("train", "--help").output.split()),
    "shown": json.loads(shown.stdout)["training.surprise_ratio"],
    "refused": refused.output,
    "wrong": wrong.output,
    "schema": json_schema()["$defs"]["TrainingSettings"]["properties"]["surprise_ratio"],
    "page": make_reference.settings_page(),
    "memory": [path for path, values in asked.items() if key(path, values[0]) != key(path, values[1])],
    "free": resumed(surprise_ratio="0.5"),
    "same": resumed(plain_surprise="4"),
}))
"""


def add_fields(section: Path, fields: str) -> None:
    """Put fields at the beginning of the section's class."""
    source = section.read_text(encoding="utf-8")
    assert source.count("\nfrom pydantic import ") == 1
    source = source.replace("\nfrom pydantic import ", f"\n{IMPORTS}from pydantic import ")
    source, count = re.subn(
        r'(\nclass \w+\(Section\):\n    """.*?"""\n)', lambda match: match[1] + fields, source, flags=re.S
    )
    assert count == 1
    section.write_text(source, encoding="utf-8")


@pytest.fixture(scope="module")
def derived(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what is derived from the settings of a copy whose sections have additional fields."""
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "qlora_cli", copy / "qlora_cli", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copytree(ROOT / "scripts", copy / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for section, fields in FIELDS.items():
        add_fields(copy / "qlora_cli" / "settings" / "sections" / f"{section}.py", fields)
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
    assert sorted(derived["takes"]) == ["inspect-data", "inspect-memory", "train", "tune"]
    assert "--surprise-ratio NUMBER Share of the steps that surprise. [default: 0.25]" in derived["help"]


def test_it_is_shown_with_its_origin_and_is_in_the_schema(derived: dict[str, Any]) -> None:
    assert derived["shown"] == {"value": 0.5, "origin": "--surprise-ratio"}
    assert derived["schema"]["default"] == 0.25
    assert derived["schema"]["description"] == "Share of the steps that surprise."


def test_it_is_in_the_reference(derived: dict[str, Any]) -> None:
    row = "| `surprise_ratio` | `--surprise-ratio` | number ≥ 0, < 1 | `0.25` | Share of the steps that surprise. |"
    assert row in derived["page"]
    assert "| `plain_surprise` |  | whole number | `3` | A number without metadata. |" in derived["page"]


def test_its_bounds_and_what_it_needs_are_checked(derived: dict[str, Any]) -> None:
    assert "--surprise-ratio: must be less than 1, got '2'" in derived["wrong"]
    message = "training.surprise_ratio has no effect with --schedule cosine: only lines surprise"
    assert message in derived["refused"]
    assert "Leave it out, or use --schedule linear." in derived["refused"]


def test_the_prediction_cache_key_has_exactly_the_values_that_memory_depends_on(derived: dict[str, Any]) -> None:
    sized = [f"{section}.surprise_size" for section in FIELDS]
    assert derived["memory"] == [*sized, "training.surprise_ratio", "quantization.int8_surprise"]


def test_a_setting_of_quantization_applies_to_the_methods_that_its_field_names(derived: dict[str, Any]) -> None:
    takes = ["chat", "evaluate", "generate", "inspect-memory", "load", "train", "tune"]
    assert sorted(derived["quantization takes"]) == takes
    assert "quantization.int8_surprise has no effect with --quant nf4" in derived["without 8 bit"]
    assert "Leave it out, or use --quant int8." in derived["without 8 bit"]
    assert derived["in effect"]["int8_surprise"] is True
    assert "int8_surprise" not in derived["not in effect"]
    assert derived["flags"] == {"int8-surprise": "on", "quant": "int8"}
    assert derived["of a run"] == {"int8_surprise": True}


def test_a_resumed_run_knows_what_may_change(derived: dict[str, Any]) -> None:
    assert derived["free"] == ["training.surprise_ratio: 0.25 before, 0.5 now"]
    assert derived["same"] == "refused: training.plain_surprise"
