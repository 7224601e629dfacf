"""A chat template as rows meet it: what it writes of a conversation, and where in the text an answer stands.

What is trained must be what is served. So an answer begins where the text ends that a server would send for the
messages before it, and it ends where the template ends the turn. Both are read off renderings of the beginnings of
the conversation, and must be beginnings of the whole.
"""

import json
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, meta, nodes
from transformers import PreTrainedTokenizerBase

from qlora_cli.data.rendering.render_timer import Pace
from qlora_cli.data.rows.examples import Conversation, RowError
from qlora_cli.events import Reporter, SilentReporter
from qlora_cli.tokenizing.template_rendering import RefusedError, render, render_all

Span = tuple[int, int]

ASKS = "add_generation_prompt"
# By these marks templates tell what the model writes; plain Jinja does not know them.
GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
# What sets parts of a message apart, as templates look for it in contents; each stands in a constant of theirs.
TAG = re.compile(r"</?[a-z_:]{1,30}>|\[/?[A-Z_]{1,30}\]|<\|[^|<>\s]{1,30}\|>|/(?:no_)?think\b")
REASONING_TAGS = ("<think>", "</think>")
# How templates are told to ask for an answer without reasoning, or with it.
REASONING_SWITCHES = tuple({name: value} for value in (False, True) for name in ("enable_thinking", "thinking"))
OTHER_ROWS = "Give a template that takes such rows (--chat-template FILE), or leave them out (--on-bad-row skip)."


class ChatTemplate:
    """The chat template of `tokenizer`; `end_ids` are tokens at which generation stops.

    Attributes:
        source: The template itself, or all those of a tokenizer that has several.
        tags: Matches what the template may take for the beginning or the end of a part of a message.
        ends: The tokens at which generation stops, as text.
        pace: What the template takes, which tells `reporter` if that is too long.
        variables: The names that it reads and does not set; None if it can't be told.
        asks_always_alike: Whether what asks for an answer does not depend on the messages before.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Set[int],
        *,
        trains_last: bool = False,
        reporter: Reporter | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._trains_last = trains_last
        self.pace = Pace(reporter or SilentReporter())
        self.ends = tuple(
            str(tokenizer.added_tokens_decoder[token]) for token in end_ids & tokenizer.added_tokens_decoder.keys()
        )
        self._added = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
        self._pieces = re.compile("|".join([*map(re.escape, self._added), TAG.pattern, "."]), re.DOTALL)
        template = tokenizer.chat_template
        self.source = template if isinstance(template, str) else "\n".join((template or {}).values())
        tags = {*REASONING_TAGS, *TAG.findall(self.source)}
        self.tags = re.compile("|".join(map(re.escape, sorted(tags, key=len, reverse=True))))
        self.asks_always_alike = asks_always_alike(template)
        tree = _tree_of(self.source)
        self.variables = None if tree is None else frozenset(meta.find_undeclared_variables(tree))

    def texts(self, conversations: Sequence[Conversation]) -> list[str] | None:
        """Return conversations without tools as texts, at less cost than one by one; None if one is refused.

        Raises:
            ModelError: the template does not end.
        """
        with self.pace.measured():
            return render_all(self._tokenizer, [each.messages for each in conversations])

    def text(self, conversation: Conversation, *, asks_answer: bool = False) -> str:
        """Return `conversation` as text, and with what asks for an answer behind it if `asks_answer`.

        Raises:
            RowError: the template refuses it.
            ModelError: the template does not end.
        """
        try:
            with self.pace.measured():
                return render(
                    self._tokenizer,
                    conversation.messages,
                    tools=conversation.tools,
                    variables=conversation.template_kwargs,
                    asks_answer=asks_answer,
                )
        except RefusedError as error:
            raise RowError(f"the chat template refuses it: {error}", hint=OTHER_ROWS) from error

    def span(self, conversation: Conversation, place: int, text: str) -> Span:
        """Return where the answer `place` stands in `text`, the rendering of all messages.

        Raises:
            RowError: the text before it is not the one that asks for it, or its turn is rendered otherwise once more
                follows.
            ModelError: the template does not end.
        """
        before = self.text(beginning(conversation, place), asks_answer=True)
        if not text.startswith(before):

            def helps(switched: Conversation) -> bool:
                return self.text(switched).startswith(self.text(beginning(switched, place), asks_answer=True))

            switch = self.switch_that_helps(conversation, helps)
            raise _not_served(place, before, text, switch, trains_last=self._trains_last)
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

    def has_token(self, text: str) -> bool:
        """Whether a token stands in `text` that was added to the vocabulary, as those are that end turns."""
        return any(token in text for token in self._added)

    def through_end_token(
        self, conversation: Conversation, span: Span, text: str, question: dict[str, Any]
    ) -> str | None:
        """Return `text` through the token behind an answer, if generation stops there, as at that of another role.

        Behind a last answer it is the token with which a `question` would begin.

        Raises:
            ModelError: the template does not end.
        """
        end = span[1]
        if not text[end:].strip():
            try:
                longer = self.text(replace(conversation, messages=[*conversation.messages, question]))
            except RowError:  # of templates that allow no more
                return None
            if not longer.startswith(text[:end]):
                return None
            text = longer
        behind = text[end:].lstrip()
        token = next((token for token in self.ends if behind.startswith(token)), None)
        return None if token is None else text[: text.index(token, end) + len(token)]

    def switch_that_helps(self, conversation: Conversation, helps: Callable[[Conversation], bool]) -> str | None:
        """Return the column with which a row tells the template to reason or not to, if that `helps`."""
        for switch in REASONING_SWITCHES:
            switched = replace(conversation, template_kwargs={**conversation.template_kwargs, **switch})
            try:
                if helps(switched):
                    return f"chat_template_kwargs: {json.dumps(switch)}"
            except RowError:
                continue
        return None

    def pieces(self, text: str) -> list[str]:
        """Return `text` as the added tokens and tags that are in it, and the characters between them."""
        return self._pieces.findall(text)

    def _through(self, conversation: Conversation, place: int, text: str) -> str:
        """Return the beginning of the text through the turn `place`, without what closes the text as a whole."""
        is_last = place + 1 == len(conversation.messages)
        through = text if is_last else self.text(beginning(conversation, place + 1))
        # Phi 3's template writes EOS behind the last turn, which ends with a token of its own, as every turn does.
        closed = through.rstrip()
        turn = closed.removesuffix(str(self._tokenizer.eos_token)).rstrip()
        if turn == closed or not turn.endswith(self._added):
            return through
        more = [*conversation.messages, {"role": "user", "content": "more"}]
        try:
            longer = self.text(replace(conversation, messages=more)) if is_last else text
        except RowError:  # of templates that allow no more
            return through
        return through if longer.startswith(closed) or not longer.startswith(turn) else turn


def beginning(conversation: Conversation, num_messages: int) -> Conversation:
    """Return the first messages of a conversation."""
    return replace(conversation, messages=conversation.messages[:num_messages])


def asks_always_alike(template: object) -> bool:
    """Whether what a template writes to ask for an answer does not depend on the messages before."""
    tree = _tree_of(template) if isinstance(template, str) else None
    if tree is None:
        return False
    asking = [part for part in tree.body if isinstance(part, nodes.If) and _names_in(part.test) == [ASKS]]
    written = {name for branch in asking for part in branch.body for name in _names_in(part)}
    return (
        bool(asking)
        and _names_in(tree).count(ASKS) == len(asking)  # it is asked for nowhere else
        and not any(branch.else_ or branch.elif_ for branch in asking)
        and not written & ({"messages"} | {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"})
    )


def _tree_of(source: str) -> nodes.Template | None:
    """Return a template as its parts; None if it can't be parsed."""
    try:
        return Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION_TAG.sub("", source))  # noqa: S701 - never rendered
    except (TemplateSyntaxError, RecursionError):
        return None


def _names_in(node: nodes.Node) -> list[str]:
    found = [node] if isinstance(node, nodes.Name) else node.find_all(nodes.Name)
    return [name.name for name in found]


def _not_served(place: int, before: str, text: str, switch: str | None, *, trains_last: bool) -> RowError:
    same = next((index for index, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(text))
    part = slice(max(0, same - 20), same + 30)
    if switch is not None:
        hint = f"Write the row as the template asks for it, or tell the template otherwise in a column {switch}."
    elif trains_last:
        hint = "Write the row as the model answers, or give another --chat-template."
    else:
        hint = (
            "Write the row as the model answers, give another --chat-template, or, if that is so for earlier answers "
            "alone, train the last one of each row (--loss-on last)."
        )
    return RowError(
        f"the chat template asks for message {place} with other words than it renders it with: a server would "
        f"send {before[part]!r} where the row has {text[part]!r}",
        hint=hint,
    )
