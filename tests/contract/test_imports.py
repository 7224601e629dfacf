"""The arrows of the architecture: which part may import which, and what the command line must not load."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / "qlora_cli"
BOTTOM = {"errors", "units", "events", "files", "writing", "cache", "bounded", "garbage", "visible", "settings"}
BOTTOM |= {"__init__"}
# Counters and the device, which need torch but know nothing of models.
MACHINE = {"counters", "device"}
FILES = {"hub", "model_files"}
MODEL = FILES | {"tokenizing", "quantization", "adapters", "loading"}
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli"},
    "errors": set(),
    "units": set(),
    "events": set(),
    "cache": {"errors"},
    "bounded": {"units"},
    "garbage": set(),
    "visible": set(),
    "files": {"errors", "units", "writing"},
    "writing": {"errors"},
    "settings": {"errors", "units"},
    "counters": BOTTOM,
    "device": BOTTOM,
    "runs": BOTTOM,
    "hub": BOTTOM,
    "model_files": BOTTOM | MACHINE | {"hub", "runs"},
    "quantization": BOTTOM | MACHINE | FILES,
    "adapters": BOTTOM | MACHINE | FILES | {"quantization"},
    "loading": BOTTOM | MACHINE | FILES | {"tokenizing", "quantization", "adapters", "runs"},
    "tokenizing": BOTTOM,
    "data": BOTTOM | {"tokenizing"},
    "memory": BOTTOM | MACHINE | MODEL | {"runs"},
    "answering": BOTTOM | MACHINE | MODEL | {"runs"},
    "training": BOTTOM | MACHINE | MODEL | {"answering", "data", "memory", "runs"},
    "merging": BOTTOM | MACHINE | MODEL | {"data", "runs"},
    "demo": BOTTOM | MACHINE | MODEL | {"answering", "evaluating", "training", "data", "memory", "runs"},
    "evaluating": BOTTOM | MACHINE | MODEL | {"data", "runs"},
    "doctor": BOTTOM | MACHINE | MODEL,
    "cli": BOTTOM
    | MACHINE
    | MODEL
    | {"answering", "evaluating", "training", "merging", "memory", "data", "demo", "doctor", "runs"},
}
MOST_LINES = 500
HEAVY = {"torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate"}
PACKAGES = {"qlora_cli"}
LIGHT = BOTTOM | {"cli", "runs", "__main__"}


def part_of(module: str) -> str:
    """Return the part that a dotted module of the package belongs to."""
    names = module.split(".")[1:]
    return names[0] if names else "__init__"


def imports_of(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Yield every module imported, its line, and whether it is imported as soon as the file is.

    Imports in functions, in `try` and under `TYPE_CHECKING` count too; a relative one is yielded as `.`.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    later = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        at_once = id(node) not in later
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, at_once
        elif isinstance(node, ast.ImportFrom):
            module = "." if node.level else str(node.module)
            # `from qlora_cli import counters` may name a module, too.
            names = [f"{module}.{alias.name}" for alias in node.names] if module in PACKAGES else [module]
            for name in names:
                yield name, node.lineno, at_once


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
                if target != part and target not in ALLOWED[part] and module != "qlora_cli.__version__":
                    found.append(f"{relative}:{line}: {part} must not import {target}")
            elif root in {"typer", "rich"} and part != "cli":
                found.append(f"{relative}:{line}: only cli imports {root}")
            elif root in HEAVY and at_once and part in LIGHT:
                found.append(f"{relative}:{line}: {part} must not import {root} outside a function")
    return found


def test_every_import_runs_the_right_way() -> None:
    assert len(list(PACKAGE.rglob("*.py"))) >= 40
    assert wrong_arrows(PACKAGE) == []


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
        ("loading/a.py", "from qlora_cli.training.run import train\n", "loading must not import training"),
        ("data/a.py", "def f():\n    import qlora_cli.loading.loader\n", "data must not import loading"),
        ("training/a.py", "import rich\n", "only cli imports rich"),
        ("cli/a.py", "import torch\n", "cli must not import torch"),
        ("settings/a.py", "try:\n    import torch\nexcept ImportError:\n    pass\n", "settings must not import torch"),
        ("data/a.py", "if TYPE_CHECKING:\n    from qlora_cli.training import run\n", "data must not import training"),
        ("errors.py", "from qlora_cli import cli\n", "errors must not import cli"),
        ("training/a.py", "from .run import train\n", "relative import"),
        ("loading/a.py", "from qlora_cli.memory import trace\n", "loading must not import memory"),
        ("counters.py", "from qlora_cli.loading import loader\n", "counters must not import loading"),
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
        ("loading/a.py", "from qlora_cli import counters\n"),
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
    """Return the files of `package` that are too long, or named after nothing."""
    paths = sorted(package.rglob("*.py"))
    too_long = [path.name for path in paths if path.read_text(encoding="utf-8").count("\n") > MOST_LINES]
    return too_long + [path.name for path in paths if path.stem in {"utils", "helpers", "misc", "common"}]


def test_files_are_rooms_not_halls(tmp_path: Path) -> None:
    assert halls(PACKAGE) == []
    (tmp_path / "long.py").write_text("x = 1\n" * (MOST_LINES + 1))
    (tmp_path / "utils.py").write_text("")
    assert halls(tmp_path) == ["long.py", "utils.py"]
