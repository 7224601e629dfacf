"""The imports of a Python file, read from its source."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

Import = tuple[str, int, bool]


def imports_of(path: Path) -> tuple[Import, ...]:
    """Return every imported name with its module, its line, and whether it is imported together with the file.

    Imports in functions, in `try` and under `TYPE_CHECKING` count too; a relative one is returned as `.`.
    """
    return _imports_in(path.read_text(encoding="utf-8"))


@cache
def _imports_in(source: str) -> tuple[Import, ...]:
    return tuple(_found_in(source))


def _found_in(source: str) -> Iterator[Import]:
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    later = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        at_once = id(node) not in later
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, at_once
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield ".", node.lineno, at_once
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:  # which may be a module as well
                yield f"{node.module}.{alias.name}", node.lineno, at_once
