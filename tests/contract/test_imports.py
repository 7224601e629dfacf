"""The arrows of the architecture: which part may import which, and what the command line must not load."""

import ast
import re
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.source_imports import imports_of

PACKAGE = Path(__file__).parent.parent.parent / "qlora_cli"
# What knows nothing of the project, each with those of its kind that it may import.
GROUND: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "units": set(),
    "events": {"units"},
    "garbage": set(),
    "visible": set(),
    "bounded": {"units"},
    "cache": {"errors"},
    "writing": {"errors"},
    "files": {"errors", "units", "writing"},
}
MOST_LINES = 500
MOST_FILES = 18  # of a folder, besides its `__init__.py`
HEAVY = {"torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "matplotlib"}
LIGHT = {*GROUND, "settings", "cli", "runs", "__main__"}
MAP_LINE = re.compile(r"^\| `(\w+)` \| .+ \| ([\w, ]*)\|$", re.MULTILINE)


def on_the_map() -> dict[str, set[str]]:
    """Return which packages each may import, besides the ground floor, as CONTRIBUTING.md has it."""
    lines = MAP_LINE.findall((PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    return {name: {other.strip() for other in others.split(",") if other.strip()} for name, others in lines}


MAP = on_the_map()
ALLOWED = {**GROUND, **{name: {*GROUND, *others} for name, others in MAP.items()}, "__main__": {"cli"}}


def test_the_map_has_every_package_below_those_that_import_it() -> None:
    folders = [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
    assert sorted(MAP) == sorted(folders)
    for at, (name, others) in enumerate(MAP.items()):
        assert others <= set(list(MAP)[:at]), name


def test_the_map_has_no_arrow_that_is_not_taken() -> None:
    for name, others in MAP.items():
        modules = {module for path in (PACKAGE / name).rglob("*.py") for module, _, _ in imports_of(path)}
        imported = {part_of(module) for module in modules if module.startswith("qlora_cli.")}
        assert others <= imported, name


def part_of(module: str) -> str:
    """Return the part that a dotted module of the package belongs to."""
    names = module.split(".")[1:]
    return names[0] if names and names[0] != "__version__" else "__init__"


def wrong_arrows(package: Path) -> list[str]:
    """Return every import in `package` that its part must not make."""
    found = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package).with_suffix("")
        part = part_of(".".join(("qlora_cli", *relative.parts)))
        for module, line, at_once in imports_of(path):
            root = module.split(".")[0]
            if module == ".":
                found.append(f"{relative}:{line}: relative import")
            elif root == "qlora_cli":
                target = part_of(module)
                if target != part and target not in ALLOWED[part]:
                    found.append(f"{relative}:{line}: {part} must not import {target}")
            elif root in {"typer", "rich"} and part != "cli":
                found.append(f"{relative}:{line}: only cli imports {root}")
            elif root in HEAVY and at_once and part in LIGHT:
                found.append(f"{relative}:{line}: {part} must not import {root} outside a function")
    return found


def test_every_import_runs_the_right_way() -> None:
    assert len(list(PACKAGE.rglob("*.py"))) >= 40
    assert wrong_arrows(PACKAGE) == []


def circles(package: Path) -> list[str]:
    """Return the files and folders of a folder that import each other in a circle, in every folder of `package`."""
    files = {path.relative_to(package.parent).with_suffix("").parts: path for path in package.rglob("*.py")}
    arrows: dict[tuple[str, ...], dict[str, set[str]]] = {}
    for names, path in files.items():
        for module, _, _ in imports_of(path):
            target = tuple(module.split("."))
            shared = next((at for at, pair in enumerate(zip(names, target, strict=False)) if len(set(pair)) > 1), None)
            if shared and shared < min(len(names), len(target)) and names[shared] != "__init__":
                arrows.setdefault(names[:shared], {}).setdefault(names[shared], set()).add(target[shared])
    found = []
    for folder, below in arrows.items():
        try:
            list(TopologicalSorter(below).static_order())
        except CycleError as error:
            found.append(f"{'/'.join(folder)}: {' -> '.join(error.args[1])}")
    return found


def test_no_two_files_or_folders_in_one_folder_import_each_other(tmp_path: Path) -> None:
    assert circles(PACKAGE) == []
    package = tmp_path / "qlora_cli"
    for name, source in {
        "memory/tracing/a.py": "from qlora_cli.memory.replaying.b import x\n",
        "memory/replaying/b.py": "def f():\n    from qlora_cli.memory.c import x\n",
        "memory/c.py": "from qlora_cli.memory.tracing import d\n",
        "memory/tracing/d.py": "from qlora_cli.units import x\n",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source)
    (found,) = circles(package)
    assert found.startswith("qlora_cli/memory: ")
    assert set(found.split(": ")[1].split(" -> ")) == {"c", "replaying", "tracing"}


# The packages of the data, in the order of the work.
DATA = ("limits", "finding", "rows", "reading", "opening", "rendering", "tokenizing", "feeding", "showing")


def test_each_package_of_the_data_imports_those_before_it_alone() -> None:
    places = [path for path in (PACKAGE / "data").rglob("*.py") if path.parent.name != "data"]
    assert {path.parent.name for path in places} == set(DATA) - {"limits"}
    for path in places:
        for module, line, _ in imports_of(path):
            names = module.split(".")
            if names[:2] == ["qlora_cli", "data"]:
                assert DATA.index(names[2]) <= DATA.index(path.parent.name), f"{path.name}:{line} imports {module}"


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("loading/a.py", "from qlora_cli.training.train_run import train\n", "loading must not import training"),
        ("data/a.py", "def f():\n    import qlora_cli.loading.loader\n", "data must not import loading"),
        ("training/a.py", "import rich\n", "only cli imports rich"),
        ("cli/a.py", "import torch\n", "cli must not import torch"),
        ("settings/a.py", "try:\n    import torch\nexcept ImportError:\n    pass\n", "settings must not import torch"),
        ("data/a.py", "if TYPE_CHECKING:\n    from qlora_cli.training import run\n", "data must not import training"),
        ("errors.py", "from qlora_cli import cli\n", "errors must not import cli"),
        ("training/a.py", "from .run import train\n", "relative import"),
        ("loading/a.py", "from qlora_cli.memory import trace\n", "loading must not import memory"),
        ("hardware/a.py", "from qlora_cli.loading import loader\n", "hardware must not import loading"),
        ("files.py", "from qlora_cli import settings\n", "files must not import settings"),
    ],
)
def test_a_wrong_arrow_is_caught(tmp_path: Path, file: str, source: str, expected: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    (found,) = wrong_arrows(tmp_path)
    assert expected in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("loading/a.py", "from qlora_cli.hardware import counters\n"),
        ("cli/a.py", "def f():\n    import torch\n"),
        ("cli/b.py", "from qlora_cli import __version__\n"),
        ("training/a.py", "from qlora_cli.data.feeding.prepare import prepare_data\n"),
    ],
)
def test_a_right_arrow_is_let_through(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    assert wrong_arrows(tmp_path) == []


def halls(package: Path) -> list[str]:
    """Return the files of `package` that are too long, or named after nothing, and folders of too many files."""
    paths = sorted(package.rglob("*.py"))
    too_long = [path.name for path in paths if path.read_text(encoding="utf-8").count("\n") > MOST_LINES]
    nameless = [path.name for path in paths if path.stem in {"utils", "helpers", "misc", "common"}]
    filled = Counter(path.parent for path in paths if path.stem != "__init__")
    return [*too_long, *nameless, *(folder.name for folder, num_files in filled.items() if num_files > MOST_FILES)]


def test_no_file_is_too_long_and_no_folder_too_full(tmp_path: Path) -> None:
    assert halls(PACKAGE) == []
    (tmp_path / "long.py").write_text("x = 1\n" * (MOST_LINES + 1))
    (tmp_path / "utils.py").write_text("")
    (tmp_path / "full").mkdir()
    for number in range(MOST_FILES + 1):
        (tmp_path / "full" / f"a{number}.py").touch()
    assert halls(tmp_path) == ["long.py", "utils.py", "full"]


# A command, and its section of the settings, go by the same word.
OF_COMMANDS = (PACKAGE / "cli" / "commands", PACKAGE / "settings" / "sections")


def test_no_two_modules_have_the_same_name() -> None:
    places: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        places.setdefault(path.stem, []).append(path.parent)
    twice = {name: found for name, found in places.items() if len(found) > 1 and name != "__init__"}
    assert {name for name, found in twice.items() if tuple(found) != OF_COMMANDS} == set()


def test_no_two_classes_have_the_same_name() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    classes = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert len(classes) > 300
    assert {name for name, num_classes in classes.items() if num_classes > 1} == set()
