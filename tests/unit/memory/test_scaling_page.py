"""docs/explanation/scaling.md is what its script prints: its text and cases, and a few rows by predicting again."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "explanation" / "scaling.md"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """`scripts/make_scaling_page.py`, imported."""
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("make_scaling_page")
    sys.path.remove(str(ROOT / "scripts"))


def rows() -> list[str]:
    return [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]


def cases(script: ModuleType) -> list[Any]:
    return [*script.BY_GPUS, *script.BY_LINK, *script.BY_LENGTH, *script.BY_MODEL]


def test_the_page_has_the_text_and_the_cases_of_the_script(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "table", lambda *_, **__: [])
    text = PAGE.read_text(encoding="utf-8")
    expected = [line for line in script.page().splitlines() if line]
    assert [line for line in text.splitlines() if line and not line.startswith("|")] == expected
    for line, case in zip(rows(), cases(script), strict=True):
        assert line.startswith(f"| `{case.model}`")
        assert f"| {case.num_gpus} {case.card}" in line
        assert case.link.value in line or case.num_gpus == 1


@pytest.mark.parametrize("num_gpus", [1, 4])
def test_a_row_is_what_is_predicted(script: ModuleType, num_gpus: int) -> None:
    of_model = [case for case in script.BY_GPUS if case.model == "llama-3.1-8b"]
    case = next(case for case in reversed(of_model) if case.num_gpus == num_gpus)
    line = rows()[cases(script).index(case)]
    efficiency = float(line.split(" | ")[8].rstrip("%")) / 100
    assert script.row(case, script.predict(case), efficiency) == line
