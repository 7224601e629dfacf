"""A model's own code runs only if the user allowed it: no call of ours leaves that open for transformers to ask."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("qlora_cli", "benchmarks", "scripts")
BUILDERS = {"from_pretrained", "from_config"}


def _calls() -> Iterator[tuple[str, ast.Call]]:
    """Yield each call by which transformers may run a model's own code, with its location."""
    for path in (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in BUILDERS:
                whose = node.func.value
                if not (isinstance(whose, ast.Name) and whose.id.startswith("Peft")):  # which has no such argument
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def _is_decided(call: ast.Call) -> bool:
    given = next((keyword.value for keyword in call.keywords if keyword.arg == "trust_remote_code"), None)
    return given is not None and not (isinstance(given, ast.Constant) and given.value is not False)


def test_each_call_that_may_run_a_models_own_code_decides_about_it() -> None:
    calls = dict(_calls())
    assert sum(place.startswith("qlora_cli/") for place in calls) >= 5
    assert [place for place, call in calls.items() if not _is_decided(call)] == []
