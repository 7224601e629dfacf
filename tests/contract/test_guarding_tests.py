"""The table in CONTRIBUTING.md lists, for each package, the tests that guard it, and no folder of tests is missing."""

import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
ROW = re.compile(r"^\| (?:`(\w+)`|the ground floor|all of them) \| ((?:`[\w/.]+`(?:, )?)+) \|$", re.MULTILINE)


def rows() -> list[tuple[str, list[str]]]:
    """Return each package with its tests; the name is empty in a row that is not about one package."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return [(package, re.findall(r"`([\w/.]+)`", tests)) for package, tests in ROW.findall(text)]


def test_each_package_has_tests_that_exist() -> None:
    packages = sorted(path.parent.name for path in (ROOT / "qlora_cli").glob("*/__init__.py"))
    assert sorted(package for package, _ in rows() if package) == packages
    missing = [test for _, tests in rows() for test in tests if not (TESTS / test).exists()]
    assert missing == []


def test_each_folder_of_tests_guards_a_package() -> None:
    named = {Path(*Path(test).parts[:2]) for _, tests in rows() for test in tests}
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
