"""Helpers for tests of `qlora merge`: a run to merge, and the command in this process, which has torch already."""

import json
import shutil
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from qlora_cli.cli.app import app
from qlora_cli.settings.models import MergeCommandSettings, MergeSettings
from qlora_cli.training.train_run import train
from tests.conftest import ASSETS, Recorder, train_settings


def merge_settings(*adapters: str | Path, **values: Any) -> MergeCommandSettings:
    """Return the settings of a merge of these adapters; `values` are settings of the base or of the merge itself."""
    merge = {key: value for key, value in values.items() if key in MergeSettings.model_fields}
    model = {key: value for key, value in values.items() if key not in merge}
    return MergeCommandSettings.model_validate({"model": model, "merge": {"adapters": [*map(str, adapters)], **merge}})


def qlora_merge(*arguments: str | Path) -> Result:
    """Run the command and return its result."""
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def merged(*arguments: str | Path) -> dict[str, Any]:
    """Run the command, which must succeed, and return its JSON."""
    done = qlora_merge(*arguments, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    report: dict[str, Any] = json.loads(done.stdout)
    return report


# Flags for a merge of which neither the comparisons nor the choice of the base are tested: most of its time.
UNCOMPARED = ("--base", "original", "--no-verify")


def refused(*arguments: str | Path) -> str:
    """Run the command, which must end with 2, and return its messages and hints."""
    done = qlora_merge(*arguments, "--device", "cpu", "--json")
    assert done.exit_code == 2, done.output
    error = json.loads(done.stdout)["error"]
    problems = error["problems"] or [error]
    assert all(problem["hint"] for problem in problems)
    return "\n".join(f"{problem['message']} | {problem['hint']}" for problem in problems)


def trained_run(directory: Path, model: Path = ASSETS / "base", **flags: object) -> Path:
    """Train a copy of `model`, the bundled one, for two steps, and return the run, which is next to its base."""
    base = directory / "base"
    shutil.copytree(model, base)
    rows = directory / "rows.jsonl"
    lines = (ASSETS / "train.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    changed = {"training__max_steps": 2, **flags}
    return train(train_settings(base, rows, directory / "run", **changed), Recorder()).output


def copy_run(run: Path, directory: Path) -> Path:
    """Copy a run with its base, so that either can be damaged, and return the new run, whose base is the copy."""
    shutil.copytree(run.parent, directory, ignore=shutil.ignore_patterns("merged*"))
    for file in ("run.json", "adapter/adapter_config.json"):
        path = directory / "run" / file
        content = path.read_text(encoding="utf-8")
        assert str(run.parent / "base") in content
        path.write_text(content.replace(str(run.parent / "base"), str(directory / "base")), encoding="utf-8")
    return directory / "run"


def adapter_alone(run: Path, directory: Path | None = None) -> Path:
    """Copy the adapter of a run to where nothing shows that it belongs to one, and return it."""
    directory = directory or run.parent / "alone"
    directory.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / "adapter" / file, directory / file)
    return directory
