"""The directions of imports: which part may import which, and what the command line must not load."""

import ast
import re
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.source.source_imports import imports_of

PACKAGE = Path(__file__).parent.parent.parent / "qlora_cli"
# The modules that know nothing of the project, each with those among them that it may import.
GROUND: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "units": set(),
    "events": {"units"},
    "garbage": set(),
    "platforms": set(),
    "visible": set(),
    "bounded": {"units"},
    "alongside": {"bounded"},
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
    """Return which packages each may import in addition to the ground floor, according to CONTRIBUTING.md."""
    lines = MAP_LINE.findall((PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    return {name: {other.strip() for other in allowed.split(",") if other.strip()} for name, allowed in lines}


MAP = on_the_map()
ALLOWED = {**GROUND, **{name: {*GROUND, *allowed} for name, allowed in MAP.items()}, "__main__": {"cli", "platforms"}}


def test_the_map_has_every_package_below_those_that_import_it() -> None:
    folders = [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
    assert sorted(MAP) == sorted(folders)
    for at, (name, allowed) in enumerate(MAP.items()):
        assert allowed <= set(list(MAP)[:at]), name


def test_the_map_allows_no_import_that_is_not_made() -> None:
    for name, allowed in MAP.items():
        modules = {module for path in (PACKAGE / name).rglob("*.py") for module, _, _ in imports_of(path)}
        imported = {part_of(module) for module in modules if module.startswith("qlora_cli.")}
        assert allowed <= imported, name


def part_of(module: str) -> str:
    """Return the part that a dotted module of the package belongs to."""
    names = module.split(".")[1:]
    return names[0] if names and names[0] != "__version__" else "__init__"


def forbidden_imports(package: Path) -> list[str]:
    """Return every import in `package` that the importing part must not make."""
    forbidden = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package).with_suffix("")
        part = part_of(".".join(("qlora_cli", *relative.parts)))
        for module, line, at_once in imports_of(path):
            root = module.split(".")[0]
            if module == ".":
                forbidden.append(f"{relative}:{line}: relative import")
            elif root == "qlora_cli":
                target = part_of(module)
                if target != part and target not in ALLOWED[part]:
                    forbidden.append(f"{relative}:{line}: {part} must not import {target}")
            elif root in {"typer", "rich"} and part != "cli":
                forbidden.append(f"{relative}:{line}: only cli imports {root}")
            elif root in HEAVY and at_once and part in LIGHT:
                forbidden.append(f"{relative}:{line}: {part} must not import {root} outside a function")
    return forbidden


def test_every_import_runs_the_right_way() -> None:
    assert len(list(PACKAGE.rglob("*.py"))) >= 40
    assert forbidden_imports(PACKAGE) == []


def import_cycles(package: Path) -> list[str]:
    """Return the cycles of imports among the files and subfolders of each folder of `package`."""
    files = {path.relative_to(package.parent).with_suffix("").parts: path for path in package.rglob("*.py")}
    imports: dict[tuple[str, ...], dict[str, set[str]]] = {}
    for names, path in files.items():
        for module, _, _ in imports_of(path):
            target = tuple(module.split("."))
            shared = next((at for at, pair in enumerate(zip(names, target, strict=False)) if len(set(pair)) > 1), None)
            if shared and shared < min(len(names), len(target)) and names[shared] != "__init__":
                imports.setdefault(names[:shared], {}).setdefault(names[shared], set()).add(target[shared])
    cycles = []
    for folder, below in imports.items():
        try:
            list(TopologicalSorter(below).static_order())
        except CycleError as error:
            cycles.append(f"{'/'.join(folder)}: {' -> '.join(error.args[1])}")
    return cycles


def test_no_two_files_or_folders_in_one_folder_import_each_other(tmp_path: Path) -> None:
    assert import_cycles(PACKAGE) == []
    package = tmp_path / "qlora_cli"
    for name, source in {
        "memory/tracing/a.py": "from qlora_cli.memory.replaying.b import x\n",
        "memory/replaying/b.py": "def f():\n    from qlora_cli.memory.c import x\n",
        "memory/c.py": "from qlora_cli.memory.tracing import d\n",
        "memory/tracing/d.py": "from qlora_cli.units import x\n",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source)
    (cycle,) = import_cycles(package)
    assert cycle.startswith("qlora_cli/memory: ")
    assert set(cycle.split(": ")[1].split(" -> ")) == {"c", "replaying", "tracing"}


# The packages of `data`, in the order of the work.
DATA = ("limits", "finding", "rows", "reading", "opening", "rendering", "tokenizing", "feeding", "showing")


def test_each_package_of_the_data_imports_only_those_before_it() -> None:
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
def test_a_forbidden_import_is_caught(tmp_path: Path, file: str, source: str, expected: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    (forbidden,) = forbidden_imports(tmp_path)
    assert expected in forbidden


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("loading/a.py", "from qlora_cli.hardware import counters\n"),
        ("cli/a.py", "def f():\n    import torch\n"),
        ("cli/b.py", "from qlora_cli import __version__\n"),
        ("training/a.py", "from qlora_cli.data.feeding.prepare import prepare_data\n"),
    ],
)
def test_an_allowed_import_passes(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    assert forbidden_imports(tmp_path) == []


def layout_faults(package: Path) -> list[str]:
    """Return the files of `package` that are too long or named after nothing, and folders of too many files."""
    paths = sorted(package.rglob("*.py"))
    too_long = [path.name for path in paths if path.read_text(encoding="utf-8").count("\n") > MOST_LINES]
    nameless = [path.name for path in paths if path.stem in {"utils", "helpers", "misc", "common"}]
    filled = Counter(path.parent for path in paths if path.stem != "__init__")
    return [*too_long, *nameless, *(folder.name for folder, num_files in filled.items() if num_files > MOST_FILES)]


def test_no_file_is_too_long_and_no_folder_too_full(tmp_path: Path) -> None:
    assert layout_faults(PACKAGE) == []
    (tmp_path / "long.py").write_text("x = 1\n" * (MOST_LINES + 1))
    (tmp_path / "utils.py").write_text("")
    (tmp_path / "full").mkdir()
    for number in range(MOST_FILES + 1):
        (tmp_path / "full" / f"a{number}.py").touch()
    assert layout_faults(tmp_path) == ["long.py", "utils.py", "full"]


# A command and its section of the settings have the same name.
OF_COMMANDS = (PACKAGE / "cli" / "commands", PACKAGE / "settings" / "sections")


def test_no_two_modules_have_the_same_name() -> None:
    places: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        places.setdefault(path.stem, []).append(path.parent)
    twice = {name: folders for name, folders in places.items() if len(folders) > 1 and name != "__init__"}
    assert {name for name, folders in twice.items() if tuple(folders) != OF_COMMANDS} == set()


def test_no_two_classes_have_the_same_name() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    classes = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert len(classes) > 300
    assert {name for name, num_classes in classes.items() if num_classes > 1} == set()
