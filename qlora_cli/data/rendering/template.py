"""Render conversations by a chat template, and determine the span of an answer in the text.

Training must match serving. So an answer begins where the prompt ends that a server would send for the messages before
it, and it ends where the template ends the turn. Both are determined by rendering prefixes of the conversation, whose
texts must be prefixes of the whole.
"""

import json
import marshal
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_cli.data.rendering.content_flow import only_inserts_contents
from qlora_cli.data.rendering.render_timer import RenderTimer
from qlora_cli.data.rendering.template_source import has_constant_prompt, variables_of
from qlora_cli.data.rows.examples import Conversation, RowError
from qlora_cli.events import Reporter, SilentReporter
from qlora_cli.tokenizing.template_rendering import TemplateRefusalError, render, render_all

Span = tuple[int, int]

# Tags that separate the parts of a message, as templates search for them in contents, in their constants.
TAG = re.compile(r"</?[a-z_:]{1,30}>|\[/?[A-Z_]{1,30}\]|<\|[^|<>\s]{1,30}\|>|/(?:no_)?think\b")
REASONING_TAGS = ("<think>", "</think>")
# Variables that switch reasoning off or on in a template.
REASONING_SWITCHES = tuple({name: value} for value in (False, True) for name in ("enable_thinking", "thinking"))
# One row has the same prefixes rendered several times. So many texts are kept, if text and conversation are so short.
MAX_KEPT_TEXTS, MAX_KEPT_SIZE = 64, 2**16
OTHER_ROWS = "Give a template that takes such rows (--chat-template FILE), or leave them out (--on-bad-row skip)."


class ChatTemplate:
    """The chat template of `tokenizer`; `end_ids` are tokens at which generation stops.

    Attributes:
        source: The template, or all templates of a tokenizer that has several.
        tags: Matches the tags that the template may take for the beginning or end of a part of a message.
        end_tokens: The tokens at which generation stops, as text.
        timer: Measures the time of the template, and warns `reporter` if it is slow.
        variables: The names that it reads and does not set; None if it can't be parsed.
        has_constant_prompt: Whether the generation prompt does not depend on the messages before it.
        only_inserts_contents: Whether the text around contents is proven to be the same for all plain messages.
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
        self.timer = RenderTimer(reporter or SilentReporter())
        self._texts: dict[bytes, str | TemplateRefusalError] = {}
        self.end_tokens = tuple(
            str(tokenizer.added_tokens_decoder[token]) for token in end_ids & tokenizer.added_tokens_decoder.keys()
        )
        self._added = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
        self._pieces = re.compile("|".join([*map(re.escape, self._added), TAG.pattern, "."]), re.DOTALL)
        template = tokenizer.chat_template
        self.source = template if isinstance(template, str) else "\n".join((template or {}).values())
        tags = {*REASONING_TAGS, *TAG.findall(self.source)}
        self.tags = re.compile("|".join(map(re.escape, sorted(tags, key=len, reverse=True))))
        self.has_constant_prompt = isinstance(template, str) and has_constant_prompt(template)
        renders = type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
        self.only_inserts_contents = renders and isinstance(template, str) and only_inserts_contents(template)
        self.variables = variables_of(self.source)

    def texts(self, conversations: Sequence[Conversation]) -> list[str] | None:
        """Render conversations without tools in one call, which is faster than one by one; None if one is refused.

        Raises:
            ModelError: the template does not end.
        """
        with self.timer.measured():
            return render_all(self._tokenizer, [each.messages for each in conversations])

    def text(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
        """Render `conversation`, followed by the generation prompt if `add_generation_prompt`.

        Raises:
            RowError: the template refuses it.
            ModelError: the template does not end.
        """
        key = _key_of(conversation, add_generation_prompt)
        text = None if key is None else self._texts.get(key)
        if text is None:
            text = self._render(conversation, add_generation_prompt)
            if key is not None and len(str(text)) <= MAX_KEPT_SIZE:
                self._keep(key, text)
        if isinstance(text, TemplateRefusalError):
            raise RowError(f"the chat template refuses it: {text}", hint=OTHER_ROWS) from text
        return text

    def _render(self, conversation: Conversation, add_generation_prompt: bool) -> str | TemplateRefusalError:
        try:
            with self.timer.measured():
                return render(
                    self._tokenizer,
                    conversation.messages,
                    tools=conversation.tools,
                    variables=conversation.template_kwargs,
                    add_generation_prompt=add_generation_prompt,
                )
        except TemplateRefusalError as error:
            return TemplateRefusalError(*error.args)  # without the frames that it was raised in

    def _keep(self, key: bytes, text: str | TemplateRefusalError) -> None:
        if len(self._texts) >= MAX_KEPT_TEXTS:
            del self._texts[next(iter(self._texts))]
        self._texts[key] = text

    def span(self, conversation: Conversation, index: int, text: str) -> Span:
        """Return the span of the answer `index` in `text`, the rendering of all messages.

        Raises:
            RowError: the text before the answer is not the prompt for it, or its turn is rendered differently when
                more follows.
            ModelError: the template does not end.
        """
        before = self.text(first_messages(conversation, index), add_generation_prompt=True)
        if not text.startswith(before):

            def helps(switched: Conversation) -> bool:
                return self.text(switched).startswith(
                    self.text(first_messages(switched, index), add_generation_prompt=True)
                )

            switch = self.helpful_switch(conversation, helps)
            raise _not_as_served_error(index, before, text, switch, trains_last=self._trains_last)
        through = self._through(conversation, index, text)
        if not text.startswith(through):
            raise RowError(
                f"the chat template renders message {index} differently when others follow it, so what is served "
                "would not be what is trained",
                hint="Train the last answer of each row only (--loss-on last), split the rows so that they end with "
                "the answer, or give another --chat-template.",
            )
        # The line break that many templates write after the end of a turn is never generated.
        return len(before), len(through.rstrip())

    def has_added_token(self, text: str) -> bool:
        """Return whether `text` contains a token that was added to the vocabulary, as tokens that end turns are."""
        return any(token in text for token in self._added)

    def through_end_token(
        self, conversation: Conversation, span: Span, text: str, question: dict[str, Any]
    ) -> str | None:
        """Return `text` through the token after an answer, if generation stops at it, as at the token of another role.

        After the last answer, that is the token with which a `question` would begin.

        Raises:
            ModelError: the template does not end.
        """
        end = span[1]
        if not text[end:].strip():
            try:
                longer = self.text(replace(conversation, messages=[*conversation.messages, question]))
            except RowError:  # of templates that allow no further message
                return None
            if not longer.startswith(text[:end]):
                return None
            text = longer
        after = text[end:].lstrip()
        token = next((token for token in self.end_tokens if after.startswith(token)), None)
        return None if token is None else text[: text.index(token, end) + len(token)]

    def helpful_switch(self, conversation: Conversation, helps: Callable[[Conversation], bool]) -> str | None:
        """Return the column by which a row switches reasoning on or off in the template, if that `helps`."""
        for switch in REASONING_SWITCHES:
            switched = replace(conversation, template_kwargs={**conversation.template_kwargs, **switch})
            try:
                if helps(switched):
                    return f"chat_template_kwargs: {json.dumps(switch)}"
            except RowError:
                continue
        return None

    def pieces(self, text: str) -> list[str]:
        """Split `text` into added tokens, tags, and single characters."""
        return self._pieces.findall(text)

    def _through(self, conversation: Conversation, index: int, text: str) -> str:
        """Return the text through the turn `index`, without a token that ends the whole text."""
        is_last = index + 1 == len(conversation.messages)
        through = text if is_last else self.text(first_messages(conversation, index + 1))
        # Phi 3's template writes EOS after the last turn, although every turn ends with another token.
        closed = through.rstrip()
        turn = closed.removesuffix(str(self._tokenizer.eos_token)).rstrip()
        if turn == closed or not turn.endswith(self._added):
            return through
        more = [*conversation.messages, {"role": "user", "content": "more"}]
        try:
            longer = self.text(replace(conversation, messages=more)) if is_last else text
        except RowError:  # of templates that allow no further message
            return through
        return through if longer.startswith(closed) or not longer.startswith(turn) else turn


def first_messages(conversation: Conversation, num_messages: int) -> Conversation:
    """Return the first messages of a conversation."""
    return replace(conversation, messages=conversation.messages[:num_messages])


def _key_of(conversation: Conversation, add_generation_prompt: bool) -> bytes | None:
    """Return what the text depends on, as bytes; None if it is long, nested deeply, or not of plain values."""
    content = (conversation.messages, conversation.tools, dict(conversation.template_kwargs), add_generation_prompt)
    try:
        key = marshal.dumps(content, 2)  # from version 3 on, equal values may differ
    except ValueError:
        return None
    return key if len(key) <= MAX_KEPT_SIZE else None


def _not_as_served_error(index: int, before: str, text: str, switch: str | None, *, trains_last: bool) -> RowError:
    num_equal = next(
        (position for position, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(text)
    )
    part = slice(max(0, num_equal - 20), num_equal + 30)
    if switch is not None:
        hint = f"Write the row as the template prompts for it, or set a column {switch}."
    elif trains_last:
        hint = "Write the row as the model answers, or give another --chat-template."
    else:
        hint = (
            "Write the row as the model answers, give another --chat-template, or, if only earlier answers are "
            "affected, train the last one of each row (--loss-on last)."
        )
    return RowError(
        f"the chat template prompts for message {index} with a different text than it renders: a server would "
        f"send {before[part]!r} where the row has {text[part]!r}",
        hint=hint,
    )
