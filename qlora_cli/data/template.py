"""A chat template as rows meet it: what it writes of a conversation, and where in the text an answer stands.

What is trained must be what is served. So an answer begins where the text ends that a server would send for the
messages before it, and it ends where the template ends the turn. Both are read off renderings of the beginnings of
the conversation, and must be beginnings of the whole.
"""

import json
import re
from collections.abc import Sequence, Set
from dataclasses import replace

from jinja2 import Environment, TemplateSyntaxError, nodes
from transformers import PreTrainedTokenizerBase

from qlora_cli.data.rows import Conversation, RowError
from qlora_cli.tokenizing.rendering import RefusedError, render, render_all

Span = tuple[int, int]

ASKS, TOKEN_NAMES = "add_generation_prompt", {"bos_token", "eos_token"}
# By these marks templates tell what the model writes; plain Jinja does not know them.
GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
# What sets parts of a message apart, as templates look for it in contents; each stands in a constant of theirs.
TAG = re.compile(r"</?[a-z_]{1,30}>|\[/?[A-Z_]{1,30}\]|<\|[^|<>\s]{1,30}\|>")
REASONING_TAGS = ("<think>", "</think>")
# How templates are told to ask for an answer without reasoning.
REASONING_SWITCHES = ({"enable_thinking": False}, {"thinking": False})


class ChatTemplate:
    """The chat template of `tokenizer`; `end_ids` are tokens at which generation stops.

    Attributes:
        tags: Matches what the template may take for the beginning or the end of a part of a message.
        asks_always_alike: Whether what asks for an answer does not depend on the messages before.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Set[int]) -> None:
        self._tokenizer = tokenizer
        self._ends = tuple(
            str(tokenizer.added_tokens_decoder[token]) for token in end_ids & tokenizer.added_tokens_decoder.keys()
        )
        self._added = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
        self._pieces = re.compile("|".join([*map(re.escape, self._added), TAG.pattern, "."]), re.DOTALL)
        template = tokenizer.chat_template
        tags = {*REASONING_TAGS, *TAG.findall(template if isinstance(template, str) else "")}
        self.tags = re.compile("|".join(map(re.escape, sorted(tags, key=len, reverse=True))))
        self.asks_always_alike = asks_always_alike(template)

    def texts(self, conversations: Sequence[Conversation]) -> list[str] | None:
        """Return conversations without tools as texts, at less cost than one by one; None if one is refused.

        Raises:
            ModelError: the template does not end.
        """
        return render_all(self._tokenizer, [each.messages for each in conversations])

    def text(self, conversation: Conversation, *, asks_answer: bool = False) -> str:
        """Return `conversation` as text, and with what asks for an answer behind it if `asks_answer`.

        Raises:
            RowError: the template refuses it.
            ModelError: the template does not end.
        """
        try:
            return render(
                self._tokenizer,
                conversation.messages,
                tools=conversation.tools,
                variables=conversation.template_kwargs,
                asks_answer=asks_answer,
            )
        except RefusedError as error:
            raise RowError(f"the chat template refuses it: {error}") from error

    def span(self, conversation: Conversation, place: int, text: str) -> Span:
        """Return where the answer `place` stands in `text`, the rendering of all messages.

        Raises:
            RowError: the text before it is not the one that asks for it, or its turn is rendered otherwise once more
                follows.
            ModelError: the template does not end.
        """
        before = self.text(beginning(conversation, place), asks_answer=True)
        if not text.startswith(before):
            raise _not_served(place, before, text, self._switch_that_helps(conversation, place))
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

    def through_end_token(self, span: Span, text: str) -> Span | None:
        """Return the span of an answer through the token behind it, if generation stops there, as at another role."""
        start, end = span
        behind = text[end:].lstrip()
        token = next((token for token in self._ends if behind.startswith(token)), None)
        return None if token is None else (start, text.index(token, end) + len(token))

    def pieces(self, text: str) -> list[str]:
        """Return `text` as the added tokens and tags that are in it, and the characters between them."""
        return self._pieces.findall(text)

    def _switch_that_helps(self, conversation: Conversation, place: int) -> dict[str, bool] | None:
        """Return the switch of reasoning with which the answer `place` is rendered as it would be served."""
        for switch in REASONING_SWITCHES:
            switched = replace(conversation, template_kwargs={**conversation.template_kwargs, **switch})
            try:
                if self.text(switched).startswith(self.text(beginning(switched, place), asks_answer=True)):
                    return switch
            except RowError:
                continue
        return None

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


def _not_served(place: int, before: str, text: str, switch: dict[str, bool] | None) -> RowError:
    same = next((index for index, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(text))
    part = slice(max(0, same - 20), same + 30)
    hint = (
        "Write the row as the model answers, give another --chat-template, or, if that is so for earlier answers "
        "alone, train the last one of each row (--loss-on last)."
        if switch is None
        else "Write the row with the reasoning that the template asks for, or tell it to ask for none, in a column "
        f"chat_template_kwargs: {json.dumps(switch)}."
    )
    return RowError(
        f"the chat template asks for message {place} with other words than it renders it with: a server would "
        f"send {before[part]!r} where the row has {text[part]!r}",
        hint=hint,
    )
