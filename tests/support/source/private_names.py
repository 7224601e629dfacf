"""Where a package uses private names of other libraries: those with a leading underscore that it does not define."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

PRIVATE = re.compile(r"_[A-Za-z]\w*")
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
OF_TEXT = {"endswith", "removesuffix", "startswith", "removeprefix"}  # their arguments are parts of names, not names


@dataclass(frozen=True, order=True)
class PrivateUse:
    """One use of a private name: `kind` is access, import, override, keyword or text."""

    name: str
    file: str
    line: int
    kind: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.name} ({self.kind})"


def is_private(name: str) -> bool:
    """Return whether a name is private to its library: one leading underscore, unlike `__len__`."""
    return PRIVATE.fullmatch(name) is not None


def private_part(dotted: str) -> str | None:
    """Return the private part of an identifier or a dotted path; None if it has none."""
    if not DOTTED.fullmatch(dotted):
        return None
    return next((part for part in dotted.split(".") if is_private(part)), None)


def private_uses_in(root: Path, package: str) -> list[PrivateUse]:
    """Return every use of another library's private name in the modules of `package`, a folder of `root`."""
    uses: set[PrivateUse] = set()
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        file = path.relative_to(root).as_posix()
        uses |= set(_Module(file, ast.parse(path.read_text(encoding="utf-8")), _imported(name)).uses())
    return sorted(uses)


def _imported(name: str) -> ModuleType | None:
    """Return a module; None if it needs a library of an extra that is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == name.partition(".")[0]:
            raise
        return None


class _Module:
    """One module, parsed and imported: what its classes inherit is known only at run time."""

    def __init__(self, file: str, tree: ast.Module, module: ModuleType | None) -> None:
        self._file = file
        self._tree = tree
        self._package = file.partition("/")[0]
        self._module = module
        self._own = set(_defined(tree))
        self._parts = {id(argument) for node in ast.walk(tree) for argument in _parts_of_names(node)}

    def uses(self) -> Iterator[PrivateUse]:
        yield from self._walk(self._tree, ())

    def _walk(self, node: ast.AST, bases: tuple[type, ...]) -> Iterator[PrivateUse]:
        """Yield the uses in `node`; `bases` are the foreign bases of the class around it."""
        for child in ast.iter_child_nodes(node):
            yield from self._at(child, bases)
            yield from self._walk(child, self._foreign_bases(child) if isinstance(child, ast.ClassDef) else bases)

    def _at(self, node: ast.AST, bases: tuple[type, ...]) -> Iterator[PrivateUse]:
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            is_of_self = _is_self(node.value)
            is_inherited = _is_super(node.value) or (is_of_self and _knows(bases, node.attr))
            if is_inherited or not (is_of_self or node.attr in self._own):
                yield self._use(node.attr, node, "access")
        elif isinstance(node, ast.ImportFrom | ast.Import):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
                for name in filter(is_private, whole.split(".")):
                    yield self._use(name, node, "import")
        elif isinstance(node, ast.FunctionDef) and is_private(node.name) and _knows(bases, node.name):
            yield self._use(node.name, node, "override")
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg and is_private(keyword.arg) and keyword.arg not in self._own:
                    yield self._use(keyword.arg, keyword, "keyword")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in self._parts:
            part = private_part(node.value)
            if part is not None and part not in self._own:
                yield self._use(part, node, "text")

    def _use(self, name: str, node: ast.expr | ast.stmt | ast.keyword, kind: str) -> PrivateUse:
        return PrivateUse(name=name, file=self._file, line=node.lineno, kind=kind)

    def _foreign_bases(self, node: ast.ClassDef) -> tuple[type, ...]:
        if self._module is None:
            return ()
        kind = getattr(self._module, node.name, None)
        if kind is None:  # defined in a function
            assert not node.bases, f"{self._file}:{node.lineno}: define {node.name} at module level, to be searched"
            return ()
        assert isinstance(kind, type)
        return tuple(base for base in kind.__mro__[1:-1] if base.__module__.partition(".")[0] != self._package)


def _defined(tree: ast.Module) -> Iterator[str]:
    """Yield the private names that a module defines: functions, classes, variables, attributes of its objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield node.attr


def _parts_of_names(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.JoinedStr):
        yield from node.values
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in OF_TEXT:
        for argument in node.args:
            yield from ast.walk(argument)


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _knows(bases: tuple[type, ...], name: str) -> bool:
    """Return whether a class in `bases` has an attribute, or gives it to its instances."""
    return any(name in vars(base) or re.search(rf"\bself\.{name}\b", source_of(base)) for base in bases)


@cache
def source_of(thing: object) -> str:
    """Return the source of a class, a function or a module; empty if it is compiled."""
    try:
        return inspect.getsource(thing)  # type: ignore[arg-type]
    except (TypeError, OSError):
        return ""
