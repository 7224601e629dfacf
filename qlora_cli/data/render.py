"""Render conversations by the chat template, and find where in the text the trained answers stand.

What is trained must be what is served. So an answer begins where the text ends that a server would send for the
messages before it, and it ends where the template ends the turn. Both are read off renderings of the beginnings of
the conversation, and must be beginnings of the whole.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes
from transformers import PreTrainedTokenizerBase

from qlora_cli.data.rows import PLAIN_KEYS, Conversation, RowError
from qlora_cli.tokenizing.rendering import RefusedError, render, render_all

Span = tuple[int, int]

ASKS, TOKEN_NAMES = "add_generation_prompt", {"bos_token", "eos_token"}
# By these marks templates tell what the model writes; plain Jinja does not know them.
GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
MOST_SHAPES = 4096  # conversations of so many different sequences of roles are remembered


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation as text, and the spans of characters that are trained, each to the end of its turn."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """What a template writes around the contents of a sequence of roles.

    `literals` stand before, between and behind the contents. An answer begins so many characters into the literal
    before it, and its turn ends so many characters into the literal behind it, by the message's place.
    """

    literals: tuple[str, ...]
    edges: dict[int, tuple[int, int]]


class Renderer:
    """Renders by the chat template of `tokenizer`.

    To render the beginnings of every conversation would cost several times what rendering it costs. Most
    conversations of a data set share a few sequences of roles, and most templates put the contents in as they are: so
    what stands around them is found once for each sequence. A row takes the short way only if its own rendering is
    exactly those pieces with its contents between them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
        # What asks for an answer may depend on contents too, though what renders it does not.
        self._asks_always_alike = _asks_always_alike(tokenizer.chat_template)
        self._shapes: dict[tuple[str, ...], _Shape | None] = {}

    def texts(self, conversations: Sequence[Conversation]) -> list[str] | None:
        """Return conversations without tools as texts, at less cost than one by one; None if one is refused.

        Raises:
            ModelError: the template does not end.
        """
        return render_all(self._tokenizer, [each.messages for each in conversations])

    def render(self, conversation: Conversation, text: str) -> Rendered:
        """Return `conversation`, whose text is `text`, with the spans of its trained answers.

        Raises:
            RowError: an answer is first, or the template refuses the row, renders a beginning of it otherwise once
                more follows, or does not end a trained turn.
            ModelError: the template does not end.
        """
        if not conversation.trained:
            return Rendered(text=text, spans=())
        if conversation.trained[0] == 0:
            raise RowError("the first message is the assistant's: there is nothing to answer")
        spans = self._by_shape(conversation, text)
        if spans is None:
            spans = [self._span(conversation, text, place) for place in conversation.trained]
        return Rendered(text=text, spans=tuple(spans))

    def text(self, conversation: Conversation) -> str:
        """Return `conversation` as text.

        Raises:
            RowError: the template refuses it.
            ModelError: the template does not end.
        """
        text = self._text(conversation.messages, conversation.tools, conversation.template_kwargs)
        _check_tools(conversation, text)
        return text

    def _by_shape(self, conversation: Conversation, text: str) -> list[Span] | None:
        if not conversation.is_plain or any(message.keys() != PLAIN_KEYS for message in conversation.messages):
            return None
        roles = tuple(message["role"] for message in conversation.messages)
        if roles not in self._shapes:
            if len(self._shapes) >= MOST_SHAPES:
                return None
            self._shapes[roles] = self._shape_of(roles)
        shape = self._shapes[roles]
        if shape is None:
            return None
        contents = [message["content"] for message in conversation.messages]
        spans = _place(shape, contents, conversation.trained, text)
        # Templates of the Llama 3 family and others trim what they put in.
        spans = spans or _place(shape, [content.strip() for content in contents], conversation.trained, text)
        if spans is not None and not self._asks_always_alike:
            before = self._text(conversation.messages[: conversation.trained[0]], None, {}, add_generation_prompt=True)
            if text[: spans[0][0]] != before:
                return None
        return spans

    def _shape_of(self, roles: Sequence[str]) -> _Shape | None:
        """Return what the template writes around contents; None if they are not all in the text, once, in order."""
        marks = [f"Mark{place}Of{len(roles)}" for place in range(len(roles))]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        try:
            text = self._text(messages, None, {})
            literals = _cut(text, marks)
            if literals is None:
                return None
            edges = {}
            starts = _starts(literals, marks)
            for place, role in enumerate(roles):
                if role != "assistant" or place == 0:
                    continue
                start, end = self._ends_of(Conversation(messages=messages, trained=()), place, text)
                edge = (start - starts[place], end - starts[place + 1])
                if not (0 <= edge[0] <= len(literals[place]) and 0 < edge[1] <= len(literals[place + 1])):
                    return None
                edges[place] = edge
        except RowError:  # such a row takes the long way, where it is named
            return None
        return _Shape(literals=tuple(literals), edges=edges)

    def _span(self, conversation: Conversation, text: str, place: int) -> Span:
        start, end = self._ends_of(conversation, place, text)
        self._check_end(conversation.messages[place], text[start:end])
        return start, end

    def _ends_of(self, conversation: Conversation, place: int, text: str) -> Span:
        """Return where the answer `place` stands in `text`, the rendering of all messages."""
        before = self._text(
            conversation.messages[:place],
            conversation.tools,
            conversation.template_kwargs,
            add_generation_prompt=True,
        )
        if not text.startswith(before):
            raise _not_served(place, before, text)
        through = self._through(conversation, place, text)
        if not text.startswith(through):
            raise RowError(
                f"the chat template renders message {place} differently when others follow it, so what is served "
                "would not be what is trained",
                hint="Train the last answer of each row only (--loss-on last), split the rows so that they end with "
                "the answer, or give another --chat-template.",
            )
        # The line break that many templates put behind the end of a turn is never generated.
        return len(before), len(through.rstrip())

    def _through(self, conversation: Conversation, place: int, text: str) -> str:
        """Return the beginning of the text through the turn `place`, without what closes the text as a whole."""
        messages, tools, variables = conversation.messages, conversation.tools, conversation.template_kwargs
        is_last = place + 1 == len(messages)
        through = text if is_last else self._text(messages[: place + 1], tools, variables)
        # Phi 3's template writes EOS behind the last turn, which ends with a token of its own, as every turn does.
        closed = through.rstrip()
        turn = closed.removesuffix(str(self._tokenizer.eos_token)).rstrip()
        if turn == closed or not turn.endswith(self._added):
            return through
        try:
            more = [*messages, {"role": "user", "content": "more"}]
            longer = self._text(more, tools, variables) if is_last else text
        except RowError:  # of templates that allow no more
            return through
        return through if longer.startswith(closed) or not longer.startswith(turn) else turn

    def _check_end(self, message: dict[str, Any], trained: str) -> None:
        """Check that the template writes something behind an answer, which the model can learn to stop with."""
        content = message["content"].rstrip()
        if not message.get("tool_calls") and trained.count(content) == 1 and trained.endswith(content):
            raise RowError(
                f"the chat template ends no turn: behind the answer {content[-30:]!r} it writes nothing that the "
                "model could learn to stop with",
                hint="Give a template that ends each turn, such as --chat-template chatml.",
            )

    def _text(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        variables: Mapping[str, Any],
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        try:
            return render(
                self._tokenizer, messages, tools=tools, variables=variables, asks_answer=add_generation_prompt
            )
        except RefusedError as error:
            raise RowError(f"the chat template refuses it: {error}") from error


def _cut(text: str, marks: Sequence[str]) -> list[str] | None:
    """Return what stands around the marks; None if one is missing, twice there or out of order."""
    literals = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            return None
        literals.append(before)
    return [*literals, text]


def _starts(literals: Sequence[str], contents: Sequence[str]) -> list[int]:
    """Return where each literal begins in the text."""
    starts, position = [0], 0
    for literal, content in zip(literals, contents, strict=False):
        position += len(literal) + len(content)
        starts.append(position)
    return starts


def _place(shape: _Shape, contents: Sequence[str], trained: Sequence[int], text: str) -> list[Span] | None:
    """Return the spans of the trained answers if `text` is the shape with these contents."""
    pieces = [piece for pair in zip(shape.literals, contents, strict=False) for piece in pair]
    if "".join(pieces) + shape.literals[-1] != text:
        return None
    ends = list(itertools.accumulate(map(len, pieces)))  # of each literal, and of the content behind it
    return [
        (
            ends[2 * place] - len(shape.literals[place]) + shape.edges[place][0],
            ends[2 * place + 1] + shape.edges[place][1],
        )
        for place in trained
    ]


def _asks_always_alike(template: object) -> bool:
    """Whether what a template writes to ask for an answer is made of constants and of the tokenizer's tokens alone."""
    if not isinstance(template, str):
        return False
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION_TAG.sub("", template))  # noqa: S701 - never rendered
    except (TemplateSyntaxError, RecursionError):
        return False
    asking = [branch for branch in tree.find_all(nodes.If) if ASKS in _names_in(branch.test)]
    written = [part for branch in asking for part in branch.body]
    return (
        bool(asking)
        and all(_names_in(branch.test) == {ASKS} for branch in asking)
        and all(isinstance(part, nodes.Output) and _names_in(part) <= TOKEN_NAMES for part in written)
    )


def _names_in(node: nodes.Node) -> set[str]:
    found = [node] if isinstance(node, nodes.Name) else node.find_all(nodes.Name)
    return {name.name for name in found}


def _check_tools(conversation: Conversation, text: str) -> None:
    """Check that tools and calls of them are in the text: many templates have no place for them, and say nothing."""
    calls = [call for message in conversation.messages for call in message.get("tool_calls") or ()]
    for what, functions in (("tools", conversation.tools or ()), ("tool calls", calls)):
        for function in functions:
            name = function.get("function", function).get("name") if isinstance(function, dict) else None
            if isinstance(name, str) and name not in text:
                raise RowError(
                    f"the chat template has no place for {what}: {name!r} is not in the text",
                    hint="Give a template that has one (--chat-template FILE), or leave such rows out.",
                )


def _not_served(place: int, before: str, text: str) -> RowError:
    same = next((index for index, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(text))
    part = slice(max(0, same - 20), same + 30)
    return RowError(
        f"the chat template asks for message {place} with other words than it renders it with: a server would "
        f"send {before[part]!r} where the row has {text[part]!r}",
        hint="Write the row as the model answers, give another --chat-template, or, if that is so for earlier answers "
        "alone, train the last one of each row (--loss-on last).",
    )
