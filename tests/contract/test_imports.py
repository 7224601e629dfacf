"""The arrows of the architecture: which part may import which, and what the command line must not load."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / "qlora_cli"
BOTTOM = {"errors", "units", "events", "settings", "__init__"}
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli"},
    "errors": set(),
    "units": set(),
    "events": set(),
    "settings": {"errors"},
    # Reads counters, knows nothing of models: the one thing below the loader.
    "memory.measure": BOTTOM,
    "loading": BOTTOM | {"memory.measure"},
    "data": BOTTOM,
    "memory": BOTTOM | {"loading", "memory.measure"},
    "training": BOTTOM | {"loading", "data", "memory", "memory.measure"},
    "merging": BOTTOM | {"loading"},
    "demo": BOTTOM | {"training", "loading", "data", "memory", "memory.measure"},
    "cli": BOTTOM | {"training", "merging", "memory", "memory.measure", "data", "loading", "demo"},
}
HEAVY = {"torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate"}
LIGHT = {"cli", "settings", "errors", "units", "events", "__init__", "__main__"}


def part_of(module: str) -> str:
    """Return the part that a dotted module of the package belongs to."""
    names = module.split(".")[1:]
    if names[:2] == ["memory", "measure"]:
        return "memory.measure"
    return names[0] if names else "__init__"


def imports_of(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Yield every module imported, its line, and whether at the top level of the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "qlora_cli" else []
            for name in names or [node.module]:
                yield name, node.lineno, id(node) in top


def wrong_arrows(package: Path) -> list[str]:
    """Return every import in `package` that its part must not make."""
    found = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package).with_suffix("")
        part = part_of(".".join(("qlora_cli", *relative.parts)))
        for module, line, top_level in imports_of(path):
            root = module.split(".")[0]
            if root == "qlora_cli":
                target = part_of(module)
                if target != part and target not in ALLOWED[part] and module != "qlora_cli.__version__":
                    found.append(f"{relative}:{line}: {part} must not import {target}")
            elif root in {"typer", "rich"} and part != "cli":
                found.append(f"{relative}:{line}: only cli imports {root}")
            elif root in HEAVY and top_level and part in LIGHT:
                found.append(f"{relative}:{line}: {part} must not import {root} at the top level")
    return found


def test_every_import_runs_the_right_way() -> None:
    assert len(list(PACKAGE.rglob("*.py"))) >= 40
    assert wrong_arrows(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("loading/a.py", "from qlora_cli.training.run import train\n", "loading must not import training"),
        ("data/a.py", "def f():\n    import qlora_cli.loading.loader\n", "data must not import loading"),
        ("training/a.py", "import rich\n", "only cli imports rich"),
        ("cli/a.py", "import torch\n", "cli must not import torch"),
        ("memory/measure.py", "from qlora_cli.loading import loader\n", "memory.measure must not import loading"),
    ],
)
def test_a_wrong_arrow_is_caught(tmp_path: Path, file: str, source: str, expected: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert expected in wrong_arrows(tmp_path)[0]


def test_files_are_rooms_not_halls() -> None:
    lengths = {path: path.read_text(encoding="utf-8").count("\n") for path in PACKAGE.rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > 500} == {}
    assert not [path for path in lengths if path.name == "utils.py"]
