"""The bounds of dependencies: a lower one for each, which is tested, and an upper one where private names are used."""

import importlib.util
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.support.source.seams import SEAMS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = {one.name: one for one in map(Requirement, PROJECT["dependencies"])}


@pytest.fixture(scope="module")
def lowest() -> Any:
    """The script that tests with the lowest versions."""
    spec = importlib.util.spec_from_file_location("test_lowest", ROOT / "scripts" / "test_lowest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_lowest_versions_are_the_lower_bounds_of_all_dependencies_but_torch(lowest: Any) -> None:
    chosen = dict(line.split("==") for line in lowest.lowest_versions(torch_too=True))
    assert chosen.keys() == REQUIREMENTS.keys()
    for name, version in chosen.items():
        assert REQUIREMENTS[name].specifier.contains(version)
        assert f">={version}" in str(REQUIREMENTS[name].specifier)
    with_torch_pinned = dict(line.split("==") for line in lowest.lowest_versions(torch_too=False))
    assert {name for name in chosen if chosen[name] != with_torch_pinned[name]} <= {"torch"}


def test_the_versions_that_the_suite_runs_with_are_within_the_bounds() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert pinned.keys() >= {"torch", "transformers", "trl", "peft"}
    outside = {
        name for name in pinned.keys() & REQUIREMENTS if not REQUIREMENTS[name].specifier.contains(pinned[name])
    }
    assert not outside


def test_libraries_whose_private_names_are_used_have_upper_bounds_above_what_was_read() -> None:
    read_at = {seam.read_at for seam in SEAMS}
    assert len(read_at) > 5
    for library, version in (one.split() for one in read_at):
        uppers = [Version(one.version) for one in REQUIREMENTS[library].specifier if one.operator == "<"]
        assert uppers, f"{library} has no upper bound, and private names of it are used"
        assert Version(version) < min(uppers)


def test_what_is_tested_with_the_lowest_versions_exists(lowest: Any) -> None:
    for chosen in lowest.TESTS:
        file, _, test = chosen.partition("::")
        name, _, case = test.partition("[")
        source = (ROOT / file).read_text(encoding="utf-8")
        assert f"def {name}(" in source or not name, chosen
        assert f'"{case.removesuffix("]")}"' in source or not case, chosen
