"""Names of files that several parts read are spelt once, by their owner; docstrings may mention them."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / "qlora_cli"
OWNERS = {
    "run.json": "runs/directory.py",
    "metrics.jsonl": "runs/directory.py",
    "report.html": "runs/directory.py",
    "step-": "runs/directory.py",
    "checkpoint-now": "runs/directory.py",
    "run.lock": "runs/directory.py",
    "merge.json": "model_files/merge_record.py",
}


@cache
def strings_in(package: Path) -> list[tuple[str, str]]:
    """Return all strings that are not docstrings, each with its file."""
    strings = []
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        strings += [
            (path.relative_to(package).as_posix(), node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
        ]
    return strings


def spelt(name: str, package: Path) -> list[str]:
    """Return the files in which a string that is not a docstring holds `name`, once for each."""
    return [file for file, string in strings_in(package) if name in string]


@pytest.mark.parametrize("name", OWNERS)
def test_a_name_is_spelt_once_by_its_owner(name: str) -> None:
    assert spelt(name, PACKAGE) == [OWNERS[name]]


def test_a_second_spelling_is_detected(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('"""About run.json."""\nRUN = "run.json"\nMESSAGE = f"{RUN} or run.json"\n')
    assert spelt("run.json", tmp_path) == ["a.py", "a.py"]
