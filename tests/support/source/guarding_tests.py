"""Which tests guard which package: the table in CONTRIBUTING.md, and what it says about changed files."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from tests.support.source.source_imports import imports_of

TESTS = Path(__file__).parents[2]
ROOT = TESTS.parent
PACKAGE = "qlora_cli"
GROUND_FLOOR, ALL = "the ground floor", "all of them"
ROW = re.compile(rf"^\| (?:`(\w+)`|({GROUND_FLOOR}|{ALL})) \| ((?:`[\w/.]+`(?:, )?)+) \|$", re.MULTILINE)


def guarding_tests() -> dict[str, list[str]]:
    """Return the tests of each package, of the ground floor and of all, as paths in `tests`."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return {package or other: re.findall(r"`([\w/.]+)`", tests) for package, other, tests in ROW.findall(text)}


def guards_of(changed: Iterable[str]) -> list[str]:
    """Return the tests that guard changed files, which are paths in the repository.

    Those that guard all packages are always among them. A changed test is run itself, a `conftest.py` with the tests
    of its folder, and what tests share with those that import it.
    """
    guarding = guarding_tests()
    found = {test for path in changed for test in _tests_of(PurePosixPath(path), guarding)}
    chosen = sorted({*guarding[ALL], *found})
    return [test for test in chosen if not any(str(parent) in chosen for parent in PurePosixPath(test).parents)]


def _tests_of(path: PurePosixPath, guarding: dict[str, list[str]]) -> Iterator[str]:
    """Yield the tests of one changed file, which may have been deleted."""
    first, *others = path.parts
    if first == PACKAGE:
        yield from guarding.get(others[0] if len(others) > 1 else GROUND_FLOOR, [])
    elif first == "benchmarks":
        yield "benchmarks"
    elif first == "tests" and path.name == "conftest.py":
        yield str(path.parent.relative_to("tests"))
    elif first == "tests" and path.suffix == ".py":
        yield from _importers(path)


def _importers(path: PurePosixPath) -> Iterator[str]:
    """Yield the files of tests that import `path`, also by way of others, and `path` itself if it is one."""
    reached, new = set[Path](), {ROOT / path}
    while new:
        reached |= new
        modules = tuple(".".join(file.relative_to(ROOT).with_suffix("").parts) for file in new)
        new = {file for file in TESTS.rglob("*.py") if file not in reached and _imports_any(file, modules)}
    for file in sorted(reached):
        if file.name.startswith("test_") and file.exists():
            yield file.relative_to(TESTS).as_posix()
        elif file.name == "conftest.py":
            yield file.parent.relative_to(TESTS).as_posix()


def _imports_any(file: Path, modules: tuple[str, ...]) -> bool:
    names = [name for name, _, _ in imports_of(file)]
    return any(name == module or name.startswith(f"{module}.") for name in names for module in modules)
