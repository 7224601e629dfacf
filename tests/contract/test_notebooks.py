"""The notebook runs from top to bottom on the bundled model, and is committed without outputs."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

from qlora_cli.cli import options
from qlora_cli.cli.app import app
from qlora_cli.settings.resolve import describe
from tests.conftest import RunQlora
from tests.contract.test_docs import parse

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
# Looks for GPUs and the hub, in processes that import PyTorch anew; its own tests run it.
LEFT_OUT = "doctor"


def cells_of(notebook: Path, kind: str) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def filled_in(line: str, names: dict[str, Any]) -> str:
    """Return a line with the values of the names in braces, as IPython does."""
    return re.sub(r"\{(\w+)\}", lambda match: str(names[match[1]]), line)


def test_there_is_a_notebook_for_a_t4() -> None:
    assert [path.name for path in NOTEBOOKS] == ["t4-16gb.ipynb"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_committed_without_outputs(notebook: Path) -> None:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in content["cells"]]
    assert len(set(names)) == len(names)
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
        assert set(cell["metadata"]) == set()
    assert content["metadata"]["colab"]["gpuType"] == "T4"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_installs_this_project(notebook: Path) -> None:
    (line,) = (cell for cell in cells_of(notebook, "code") if cell.startswith("%"))
    name = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    assert line == f"%pip install --quiet {name}"
    assert any("%pip install --quiet -c constraints.txt ." in text for text in cells_of(notebook, "markdown"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_what_is_said_to_change_for_a_real_model_is_what_the_cell_sets(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = (cell for cell in cells_of(notebook, "code") if "SETTINGS =" in cell)
    (text,) = (text for text in cells_of(notebook, "markdown") if "SETTINGS =" in text)
    other = text.partition("```python\n")[2].partition("```")[0]
    bundled: dict[str, Any] = {}
    real: dict[str, Any] = {}
    exec(cell, bundled)  # noqa: S102 - a notebook is run
    exec(other, real)  # noqa: S102
    capitals = [{name for name in names if name.isupper()} for names in (bundled, real)]
    assert capitals[0] == capitals[1]
    monkeypatch.chdir(tmp_path)
    Path("qlora.yaml").write_text(real["SETTINGS"], encoding="utf-8")
    for command in cells_of(notebook, "code"):
        if command.startswith("!"):
            context = parse(typer.main.get_command(app), shlex.split(filled_in(command[1:], real))[1:])
            assert "assignments" not in context.params or describe(options.read_sources(context))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_from_top_to_bottom(
    notebook: Path, run_qlora: RunQlora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    outputs: dict[str, str] = {}
    for cell in cells_of(notebook, "code"):
        if cell.startswith("%pip "):
            continue
        if not cell.startswith("!"):
            exec(cell.replace("max_steps: 40", "max_steps: 8"), names)  # noqa: S102 - enough to learn something
            continue
        program, command, *arguments = shlex.split(filled_in(cell[1:], names))
        assert program == "qlora"
        if command == LEFT_OUT:
            parse(typer.main.get_command(app), [command, *arguments])
            continue
        done = run_qlora(command, *arguments, cwd=tmp_path)
        assert done.code == 0, (cell, done.stderr)
        outputs[command] = done.stdout
    assert "Fits a T4" in outputs["inspect-memory"]
    assert "«" in outputs["inspect-data"]
    before, after = (
        float(loss) for loss in re.findall(r"^ *(?:base|adapter)\b.*?(\d\.\d{3,})", outputs["evaluate"], re.M)
    )
    assert after < before
    assert outputs["generate"].count("\n") > 2
    assert (tmp_path / "runs" / "first" / "merged" / "config.json").is_file()
