"""Prove that a chat template only inserts contents: that no decision in it depends on what a content says.

The text around the contents of such a template is the same for all conversations of the same roles, so it has to be
rendered only once. The proof follows the contents through the template's syntax tree: they may be assigned,
concatenated, trimmed and written, but not compared, searched, measured, cut or passed to a function. Whatever is not
known to be safe ends the proof.

It holds for messages with a role and a content only, which is text and not just spaces.
"""

import functools
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import TypeGuard

from jinja2 import nodes

from qlora_cli.data.rendering.template_source import parse

CONTENT_KEY = "content"
TRIM_METHODS = ("strip", "lstrip", "rstrip")
# Tests of a type, or of whether there is a value: all contents give the same result.
TYPE_TESTS = frozenset(
    (
        *("defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number", "integer", "float"),
        *("boolean", "true", "false", "callable"),
    )
)
# Filters that make a constant of constants: none that is random, and none that marks text as safe, because what is
# added to such text is escaped.
CONSTANT_FILTERS = frozenset(
    (
        *("abs", "batch", "capitalize", "count", "d", "default", "dictsort", "first", "float", "format", "indent"),
        *("int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr"),
        *("replace", "reverse", "round", "select", "selectattr", "slice", "sort", "string", "sum", "title", "tojson"),
        *("trim", "unique", "upper", "wordcount"),
    )
)
# Functions whose results differ from one call to the next.
CHANGING_FUNCTIONS = ("lipsum", "strftime_now")
# Attributes of dictionaries, which Jinja finds as attributes and as items; only `get` is understood.
DICTIONARY_ATTRIBUTES = frozenset(dir(dict))
# The variable of a loop, and its attributes that are items.
LOOP, NEIGHBOURS = "loop", ("previtem", "nextitem")


class Kind(Enum):
    """What an expression of a template depends on."""

    CONSTANT = "nothing in the contents"
    MESSAGES = "a list of messages"
    MESSAGE = "a message"
    CONTENT = "a content, perhaps without the spaces around it"
    TEXT = "text that includes a content"


class _NotProvenError(Exception):
    """A part of the template may depend on what a content says."""


@functools.lru_cache
def only_inserts_contents(source: str) -> bool:
    """Return whether a template is proven to write the same text around all contents, for the same roles."""
    tree = parse(source)
    if tree is None:
        return False
    try:
        _ContentTracker(tree).track()
    except (_NotProvenError, RecursionError):
        return False
    return True


class _ContentTracker:
    """Visits the nodes of a template. A kind of node that is not registered ends the proof.

    A name has one kind in the whole template, whatever its scope: that of all values assigned to it. Contents must not
    be stored in namespaces, which can have several names.
    """

    def __init__(self, tree: nodes.Template) -> None:
        self._tree = tree
        self._kinds = {"messages": Kind.MESSAGES}
        self._captures_output = False

    def track(self) -> None:
        """Visit the template until the kinds of all names are known.

        Raises:
            _NotProvenError: a part of it may depend on what a content says.
        """
        known: dict[str, Kind] = {}
        while known != self._kinds:
            known = dict(self._kinds)
            self._visit_all(self._tree.body)

    @functools.singledispatchmethod
    def _visit(self, node: nodes.Node) -> None:
        """Visit a statement."""
        raise _NotProvenError(type(node).__name__)

    @_visit.register
    def _visit_output(self, node: nodes.Output) -> None:
        kinds = {self._kind(part) for part in node.nodes}
        if kinds & {Kind.MESSAGE, Kind.MESSAGES} or (self._captures_output and kinds != {Kind.CONSTANT}):
            raise _NotProvenError("written as a whole")

    @_visit.register
    def _visit_if(self, node: nodes.If) -> None:
        self._kind(node.test)  # a content or a message counts as true
        self._visit_all([*node.body, *node.elif_, *node.else_])

    @_visit.register
    def _visit_loop(self, node: nodes.For) -> None:
        item = {Kind.CONSTANT: Kind.CONSTANT, Kind.MESSAGES: Kind.MESSAGE}.get(self._kind(node.iter))
        if item is None or node.recursive:
            raise _NotProvenError("iterates over a content")
        self._assign(node.target, item)
        if node.test is not None:
            self._kind(node.test)
        self._visit_all([*node.body, *node.else_])

    @_visit.register
    def _visit_assignment(self, node: nodes.Assign) -> None:
        self._assign(node.target, self._kind(node.node))

    @_visit.register
    def _visit_block_assignment(self, node: nodes.AssignBlock) -> None:
        if node.filter is not None:
            raise _NotProvenError("filters its output")
        self._visit_captured(node.body)

    @_visit.register
    def _visit_macro(self, node: nodes.Macro) -> None:
        # Calls pass constants only, so parameters are what any other name is.
        self._require_constant(node.defaults)
        self._visit_captured(node.body)

    @_visit.register
    def _visit_break(self, node: nodes.Break | nodes.Continue) -> None:
        """Nothing depends on it that does not depend on the test before it."""

    @functools.singledispatchmethod
    def _kind(self, node: nodes.Node) -> Kind:
        """Return the kind of an expression."""
        raise _NotProvenError(type(node).__name__)

    @_kind.register
    def _kind_of_name(self, node: nodes.Name) -> Kind:
        if node.name in (LOOP, *CHANGING_FUNCTIONS):
            raise _NotProvenError(node.name)
        return self._kinds.get(node.name, Kind.CONSTANT)

    @_kind.register
    def _kind_of_attribute(self, node: nodes.Getattr) -> Kind:
        if isinstance(node.node, nodes.Name) and node.node.name == LOOP:
            return Kind.MESSAGE if node.attr in NEIGHBOURS else Kind.CONSTANT
        owner = self._kind(node.node)
        if owner == Kind.MESSAGE:
            return _kind_of_key(node.attr)
        return self._require(owner, Kind.CONSTANT)

    @_kind.register
    def _kind_of_item(self, node: nodes.Getitem) -> Kind:
        owner = self._kind(node.node)
        if owner == Kind.MESSAGE and isinstance(node.arg, nodes.Const):
            return _kind_of_key(node.arg.value)
        self._require_constant([node.arg])
        if owner == Kind.MESSAGES and not (isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str)):
            return Kind.MESSAGES if isinstance(node.arg, nodes.Slice) else Kind.MESSAGE
        return self._require(owner, Kind.CONSTANT)

    @_kind.register
    def _kind_of_call(self, node: nodes.Call) -> Kind:
        function = node.node
        self._require_constant([*node.args, *node.kwargs, node.dyn_args, node.dyn_kwargs])
        if isinstance(function, nodes.Getattr) and function.attr in ("get", *TRIM_METHODS):
            owner = self._kind(function.node)
            if owner == Kind.MESSAGE and function.attr == "get" and _is_constant_key(node.args):
                return _kind_of_key(node.args[0].value)
            if owner == Kind.CONTENT and function.attr in TRIM_METHODS and not _has_arguments(node):
                return Kind.CONTENT
        return self._require(self._kind(function), Kind.CONSTANT)

    @_kind.register
    def _kind_of_filter(self, node: nodes.Filter) -> Kind:
        if node.node is None:
            raise _NotProvenError("filters its output")
        kind, name = self._kind(node.node), node.name
        self._require_constant([*node.args, *node.kwargs, node.dyn_args, node.dyn_kwargs])
        if kind == Kind.CONSTANT and name in CONSTANT_FILTERS and (name != "map" or _maps_attribute(node)):
            return kind
        if kind == Kind.CONTENT and (
            (name == "trim" and not _has_arguments(node)) or name in ("string", "default", "d")
        ):
            return kind
        if kind == Kind.MESSAGES and name in ("length", "count"):
            return Kind.CONSTANT
        if kind == Kind.MESSAGES and name in ("first", "last"):
            return Kind.MESSAGE
        if kind == Kind.MESSAGES and (name == "list" or (name in ("selectattr", "rejectattr") and _reads_role(node))):
            return kind
        raise _NotProvenError(name)

    @_kind.register
    def _kind_of_test(self, node: nodes.Test) -> Kind:
        self._require_constant([*node.args, *node.kwargs, node.dyn_args, node.dyn_kwargs])
        if self._kind(node.node) != Kind.CONSTANT and node.name not in TYPE_TESTS:
            raise _NotProvenError(node.name)
        return Kind.CONSTANT

    @_kind.register
    def _kind_of_comparison(self, node: nodes.Compare) -> Kind:
        self._require_constant([node.expr])
        if len(node.ops) == 1 and node.ops[0].op in ("in", "notin") and self._kind(node.ops[0].expr) == Kind.MESSAGE:
            return Kind.CONSTANT  # whether a message has a key
        self._require_constant([operand.expr for operand in node.ops])
        return Kind.CONSTANT

    @_kind.register
    def _kind_of_negation(self, node: nodes.Not) -> Kind:
        self._kind(node.node)
        return Kind.CONSTANT

    @_kind.register
    def _kind_of_conditional(self, node: nodes.CondExpr) -> Kind:
        self._kind(node.test)
        return _joined(self._kind(node.expr1), Kind.CONSTANT if node.expr2 is None else self._kind(node.expr2))

    @_kind.register
    def _kind_of_choice(self, node: nodes.And | nodes.Or) -> Kind:
        return _joined(self._kind(node.left), self._kind(node.right))

    @_kind.register
    def _kind_of_sum(self, node: nodes.Add | nodes.Concat) -> Kind:
        kinds = {self._kind(part) for part in node.iter_child_nodes()}
        if kinds & {Kind.MESSAGE, Kind.MESSAGES}:
            raise _NotProvenError("concatenates messages")
        return Kind.CONSTANT if kinds == {Kind.CONSTANT} else Kind.TEXT

    @_kind.register
    def _kind_of_literal(
        self, node: nodes.Literal | nodes.Pair | nodes.Slice | nodes.Keyword | nodes.BinExpr | nodes.UnaryExpr
    ) -> Kind:
        """Return the kind of a value that is made of others, or of no other, by any operation."""
        return self._require_constant(node.iter_child_nodes())

    def _visit_all(self, parts: Iterable[nodes.Node]) -> None:
        for part in parts:
            self._visit(part)

    def _visit_captured(self, parts: Iterable[nodes.Node]) -> None:
        """Visit parts whose output becomes a value, which must be a constant."""
        outside, self._captures_output = self._captures_output, True
        self._visit_all(parts)
        self._captures_output = outside

    def _assign(self, target: nodes.Node, kind: Kind) -> None:
        if isinstance(target, nodes.Name) and target.name != LOOP:
            self._kinds[target.name] = _joined(self._kinds.get(target.name, Kind.CONSTANT), kind)
        else:  # an attribute of a namespace, or several names
            self._require(kind, Kind.CONSTANT)

    def _require(self, kind: Kind, required: Kind) -> Kind:
        if kind != required:
            raise _NotProvenError(kind.value)
        return kind

    def _require_constant(self, parts: Iterable[nodes.Node | None]) -> Kind:
        for part in parts:
            if part is not None:
                self._require(self._kind(part), Kind.CONSTANT)
        return Kind.CONSTANT


def _kind_of_key(key: object) -> Kind:
    """Return the kind of what a message has under a key; without other keys than role and content, a constant.

    Raises:
        _NotProvenError: it is a method of dictionaries.
    """
    if key in DICTIONARY_ATTRIBUTES:
        raise _NotProvenError(str(key))
    return Kind.CONTENT if key == CONTENT_KEY else Kind.CONSTANT


def _joined(first: Kind, second: Kind) -> Kind:
    """Return the kind of a value that is one of two."""
    if second in (first, Kind.CONSTANT):
        return first
    if first == Kind.CONSTANT:
        return second
    if {first, second} == {Kind.CONTENT, Kind.TEXT}:
        return Kind.TEXT
    raise _NotProvenError(f"{first.value}, or {second.value}")


def _has_arguments(node: nodes.Call | nodes.Filter) -> bool:
    return bool(node.args or node.kwargs or node.dyn_args or node.dyn_kwargs)


def _maps_attribute(node: nodes.Filter) -> bool:
    """Return whether `map` selects an attribute, and does not apply a filter."""
    is_static = not (node.args or node.dyn_args or node.dyn_kwargs)
    return is_static and all(keyword.key in ("attribute", "default") for keyword in node.kwargs)


def _reads_role(node: nodes.Filter) -> bool:
    return _is_constant_key(node.args) and node.args[0].value == "role"


def _is_constant_key(arguments: Sequence[nodes.Expr]) -> TypeGuard[Sequence[nodes.Const]]:
    return bool(arguments) and isinstance(arguments[0], nodes.Const)
