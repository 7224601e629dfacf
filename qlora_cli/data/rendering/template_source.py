"""What the source of a chat template says about it, without rendering it."""

import functools

from jinja2 import Environment, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

GENERATION_PROMPT = "add_generation_prompt"


class GenerationTag(Extension):
    """The tag by which templates mark what the model writes, which plain Jinja does not know; its content is kept."""

    tags = frozenset(("generation",))  # type: ignore[assignment] # Jinja only looks a name up

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what is within the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache
def has_constant_prompt(source: str) -> bool:
    """Return whether the generation prompt of a template does not depend on the messages before it."""
    tree = parse(source)
    if tree is None:
        return False
    branches = [
        part for part in tree.body if isinstance(part, nodes.If) and _names_in(part.test) == [GENERATION_PROMPT]
    ]
    names = {name for branch in branches for part in branch.body for name in _names_in(part)}
    return (
        bool(branches)
        and _names_in(tree).count(GENERATION_PROMPT) == len(branches)  # it is used nowhere else
        and not any(branch.else_ or branch.elif_ for branch in branches)
        and not names & ({"messages"} | {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"})
    )


@functools.lru_cache
def variables_of(source: str) -> frozenset[str] | None:
    """Return the names that a template reads and does not set; None if it can't be parsed."""
    tree = parse(source)
    return None if tree is None else frozenset(meta.find_undeclared_variables(tree))


def parse(source: str) -> nodes.Template | None:
    """Return a template as its parts; None if it can't be parsed."""
    try:
        return Environment(extensions=[GenerationTag, "jinja2.ext.loopcontrols"]).parse(source)  # noqa: S701 - never rendered
    except (TemplateSyntaxError, RecursionError):
        return None


def _names_in(node: nodes.Node) -> list[str]:
    named = [node] if isinstance(node, nodes.Name) else node.find_all(nodes.Name)
    return [name.name for name in named]
