"""The table in CONTRIBUTING.md lists, for each package, the tests that guard it, and no folder of tests is missing."""

import re
from pathlib import Path

import pytest

from tests.support.source.guarding_tests import ALL, GROUND_FLOOR, ROOT, TESTS, guarding_tests, guards_of


def test_each_package_has_tests_that_exist() -> None:
    packages = sorted(path.parent.name for path in (ROOT / "qlora_cli").glob("*/__init__.py"))
    assert sorted(guarding_tests()) == sorted([*packages, GROUND_FLOOR, ALL])
    missing = [test for tests in guarding_tests().values() for test in tests if not (TESTS / test).exists()]
    assert missing == []


def test_each_folder_of_tests_guards_a_package() -> None:
    named = {Path(*Path(test).parts[:2]) for tests in guarding_tests().values() for test in tests}
    folders = [
        path.parent.relative_to(TESTS)
        for kind in ("unit", "integration")
        for path in TESTS.glob(f"{kind}/*/__init__.py")
    ]
    assert folders
    assert [folder for folder in folders if folder not in named] == []


def test_the_fast_tests_exist_and_cover_most_packages() -> None:
    script = (ROOT / "scripts" / "test").read_text(encoding="utf-8")
    (names,) = re.findall(r"tests/contract/test_\{([\w,]+)\}\.py", script)
    assert [name for name in names.split(",") if not (TESTS / "contract" / f"test_{name}.py").exists()] == []
    files = [
        path for path in (TESTS / "integration").rglob("test_*.py") if "pytest.mark.fast" in path.read_text("utf-8")
    ]
    assert {"adapters", "data", "hub", "memory", "merging", "training"} <= {path.parent.name for path in files}


def test_a_changed_package_is_guarded_by_its_tests_and_those_of_all() -> None:
    """None is named twice, also where a folder is named and a file in it."""
    table = guarding_tests()
    for package in table.keys() - {GROUND_FLOOR, ALL}:
        expected = {*table[package], *table[ALL]}
        assert set(guards_of([f"qlora_cli/{package}/a.py", f"qlora_cli/{package}/b/c.jinja"])) == expected
    assert set(guards_of(["qlora_cli/errors.py"])) == {*table[GROUND_FLOOR], *table[ALL]}
    assert set(guards_of(["README.md"])) == set(table[ALL])
    both = guards_of(["qlora_cli/loading/a.py", "qlora_cli/quantization/a.py", "qlora_cli/model_files/a.py"])
    assert "integration/loading" in both
    assert not [test for test in both if test.startswith("integration/loading/")]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("tests/unit/loss/test_output_head.py", "unit/loss/test_output_head.py"),
        ("tests/integration/training/conftest.py", "integration/training"),
        ("tests/support/source/source_imports.py", "contract/test_imports.py"),
        ("tests/support/source/source_imports.py", "contract/test_guarding_tests.py"),  # by way of another
        ("tests/support/processes/forks.py", "integration"),  # by way of its conftest.py
        ("benchmarks/charts.py", "benchmarks"),
    ],
)
def test_what_tests_share_is_guarded_by_those_that_import_it(changed: str, expected: str) -> None:
    assert {expected, *map(str, Path(expected).parents)} & set(guards_of([changed]))
