"""Render conversations by the chat template; a value that the template drops is an error or a note.

Dropped values and the spans of trained answers are found with marks, once for each sequence of roles and keys; a row
itself is only examined if its contents may make a difference.
"""

import itertools
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from qlora_cli.data.rendering.dropped_values import (
    MAY_BE_DROPPED,
    ReasoningFixes,
    dropped_value_error,
    matching_value,
    no_turn_end_error,
)
from qlora_cli.data.rendering.message_form import AS_WRITTEN, MessageForm, merge_forms
from qlora_cli.data.rendering.template import ChatTemplate, Span, first_messages
from qlora_cli.data.rendering.template_fit import REASONING_END, TemplateFit, dropped_values, find_fit, merge_fits
from qlora_cli.data.rendering.turn_units import TurnUnit, shortest_example, split_into_units
from qlora_cli.data.rendering.value_marks import Value, ValueKind, mark_values, without_key
from qlora_cli.data.rows.examples import PLAIN_KEYS, Conversation, RowError
from qlora_cli.events import Reporter
from qlora_cli.settings.choices import LossOn

WITH_REASONING = Conversation(
    messages=[
        {"role": "user", "content": "text"},
        {"role": "assistant", "content": "<think>\ntext\n</think>\n\ntext"},
    ],
    trained=(),
)
SPACES = "\v\f\x1c\x1d\x1e"  # what `str.strip` removes and no template writes; random ones surround marks
NUM_SPACES = 24
Trim = Callable[[str], str]
# By whether a space before a mark is kept, and one after it.
TRIMS: Mapping[tuple[bool, bool], Trim] = {
    (True, True): str,
    (True, False): str.rstrip,
    (False, True): str.lstrip,
    (False, False): str.strip,
}
MAX_CACHED_SHAPES = 4096  # sequences of roles, and of roles and keys


class Rendered(NamedTuple):
    """A conversation as text, with the spans of characters to train, each through the end of its turn."""

    text: str
    spans: tuple[Span, ...]


class FittedConversation(NamedTuple):
    """A conversation as in the row, and in the form that the template accepts.

    `roles` is set if all messages are plain: role and content only.
    """

    original: Conversation
    conversation: Conversation
    roles: tuple[str, ...] | None
    fit: TemplateFit


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """The text that a template writes around the contents of a sequence of roles.

    `literals` are the texts before, between and after the contents; `trims` have what the template does to the spaces
    around each content. `edges` have, by the index of an answer, the offset at which it begins in the literal before
    it, and the offset at which its turn ends in the literal after it.
    """

    literals: tuple[str, ...]
    trims: tuple[Trim, ...]
    edges: dict[int, tuple[int, int]]

    def insert(self, contents: Sequence[str], trained: Sequence[int]) -> tuple[str, dict[int, Span]]:
        """Return the text with contents inserted, and the spans of the trained answers in it."""
        pieces = list[str]()
        for literal, trim, content in zip(self.literals, self.trims, contents, strict=False):
            pieces += (literal, trim(content))
        ends = list(itertools.accumulate(map(len, pieces)))  # of each literal, and of the content after it
        spans = {
            index: (
                ends[2 * index] - len(self.literals[index]) + self.edges[index][0],
                ends[2 * index + 1] + self.edges[index][1],
            )
            for index in trained
        }
        return "".join(pieces) + self.literals[-1], spans


class Renderer:
    """Renders by the chat template of `tokenizer`; `end_ids` are tokens at which generation stops.

    Rendering each prefix of every conversation would cost several times as much as rendering it once. But most
    conversations of a data set share a few sequences of roles, and most templates insert contents unchanged. So the
    text around contents is determined once per sequence, and used for a row if its rendering is exactly that text with
    its contents inserted. Where the source of a template proves that it always is, rows are not even rendered once.

    Attributes:
        num_dropped: The number of used rows that the template dropped values from, by kind of value.
        dropped_keys: The unknown keys of messages whose text was dropped.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        loss_on: LossOn,
        end_ids: Set[int],
        *,
        accepts_lost: bool = False,
        reporter: Reporter | None = None,
    ) -> None:
        self.num_dropped: Counter[ValueKind] = Counter()
        self.dropped_keys: set[str] = set()
        self._template = ChatTemplate(tokenizer, end_ids, trains_last=loss_on == LossOn.LAST, reporter=reporter)
        self._trains_all = loss_on == LossOn.ALL
        self._accepts_lost = accepts_lost
        self._fits: dict[tuple[object, MessageForm | None], tuple[TemplateFit, int] | None] = {}
        self._fits_of_roles: dict[tuple[str, ...], TemplateFit] = {}
        self._shapes: dict[tuple[str, ...], _Shape | None] = {}

    def fit(self, conversation: Conversation) -> FittedConversation:
        """Return `conversation` in the form that the template accepts.

        Raises:
            RowError: the template drops a value that must not be lost, in any form.
            ModelError: the template does not end.
        """
        roles = _roles_of(conversation)
        fit = self._fit_of(conversation) if roles is None else self._fit_of_roles(roles)
        self._check(conversation, fit)
        return FittedConversation(
            original=conversation, conversation=fit.form.apply(conversation), roles=roles, fit=fit
        )

    def writes_key(self, key: str, rows: Sequence[Conversation]) -> bool:
        """Return whether the text of any of `rows` depends on an unknown key: `KEY` or `tool_calls.KEY`."""
        return key not in self.dropped_keys and any(self._depends_on(key, row) for row in rows)

    def reads_variable(self, name: str) -> bool:
        """Return whether the template reads a variable of this name that a row may set."""
        return self._template.variables is None or name in self._template.variables

    def _depends_on(self, key: str, row: Conversation) -> bool:
        try:
            form = self.fit(row).fit.form
            text = self._template.text(form.apply(row))
        except RowError:  # refused with an error of its own
            return False
        try:
            return text != self._template.text(form.apply(without_key(row, key)))
        except RowError:  # of a template that requires the key
            return True

    def insert(self, row: FittedConversation) -> Rendered | None:
        """Return a conversation rendered without the template; None if the template must render it."""
        shape = self._shape_for(row) if self._template.only_inserts_contents else None
        trained = () if self._trains_all else row.original.trained
        if shape is None or 0 in trained or not row.fit.form.keeps_text(row.original.messages):
            return None
        contents = [message["content"] for message in row.original.messages]
        if not all(map(str.strip, contents)):
            return None
        self._template.timer.row_done()
        text, spans = shape.insert(contents, trained)
        return Rendered(text=text, spans=((0, len(text)),) if self._trains_all else tuple(spans.values()))

    def texts(self, rows: Sequence[FittedConversation]) -> list[str] | None:
        """Render plain conversations in one call, which is faster than one by one; None if one is refused.

        Raises:
            ModelError: the template does not end.
        """
        return self._template.texts([row.conversation for row in rows])

    def text(self, row: FittedConversation) -> str:
        """Render a conversation.

        Raises:
            RowError: the template refuses it.
            ModelError: the template does not end.
        """
        return self._template.text(row.conversation)

    def render(self, row: FittedConversation, text: str) -> Rendered:
        """Return a conversation rendered as `text`, with the spans to train.

        Raises:
            RowError: the first message is an answer, or the template drops a value that must not be lost, renders a
                prefix of the row differently when more follows, or does not end a trained turn.
            ModelError: the template does not end.
        """
        self._template.timer.row_done()
        if not self._trains_all and not row.original.trained:
            return Rendered(text=text, spans=())
        if not self._trains_all and row.original.trained[0] == 0:
            raise RowError("the first message is the assistant's: there is nothing to answer")
        spans = self._spans_by_shape(row, text)
        if spans is None:
            text, spans = self._spans_by_rendering(row, text)
        return Rendered(text=text, spans=((0, len(text)),) if self._trains_all else tuple(spans.values()))

    def _shape_for(self, row: FittedConversation) -> _Shape | None:
        if row.roles is None:
            return None
        if row.roles not in self._shapes:
            if len(self._shapes) >= MAX_CACHED_SHAPES:
                self._shapes.clear()
            self._shapes[row.roles] = self._shape_of(row.roles, row.fit.form)
        return self._shapes[row.roles]

    def _spans_by_shape(self, row: FittedConversation, text: str) -> dict[int, Span] | None:
        """Return the spans of trained answers if the text is the shape with the contents inserted; None otherwise."""
        shape = self._shape_for(row)
        contents = [message["content"] for message in row.original.messages]
        if shape is None:
            return None
        inserted, spans = shape.insert(contents, () if self._trains_all else row.original.trained)
        if inserted != text:
            return None
        if not self._template.has_constant_prompt:
            for index, (start, _) in spans.items():
                if text[:start] != self._template.text(
                    first_messages(row.conversation, index), add_generation_prompt=True
                ):
                    return None
        return spans

    def _spans_by_rendering(self, row: FittedConversation, text: str) -> tuple[str, dict[int, Span]]:
        """Return the text and the spans to train of a row whose contents may affect what the template writes."""
        fit = row.fit
        if row.roles is not None:  # the cached fit is that of contents without tags
            fit = self._fit_of(row.original, row.fit.form)
            self._check(row.original, fit)
        trained = () if self._trains_all else row.original.trained
        spans = {index: self._template.span(row.conversation, index, text) for index in trained}
        row_fit = TemplateFit(
            dropped=tuple(dropped_values(mark_values(row.original, self._template.tags).values, text, spans))
        )
        self._check(row.original, row_fit)
        for index, span in spans.items():
            message = row.original.messages[index]
            is_bare = index in fit.unknown and _is_bare(message, text[slice(*span)])
            if is_bare or index in fit.unterminated:
                question = fit.form.message({"role": "user", "content": "more"})
                through = self._template.through_end_token(row.conversation, span, text, question)
                if through is None:
                    raise no_turn_end_error(index, message)
                spans[index] = (span[0], len(through))
                text = text if text.startswith(through) else through
        self.num_dropped.update(
            {dropped.value.kind for dropped in (*row_fit.dropped, *fit.dropped)} - {ValueKind.OTHER}
        )
        self.dropped_keys |= {dropped.value.key for dropped in fit.dropped if dropped.value.kind == ValueKind.OTHER}
        return text, spans

    def _fit_of_roles(self, roles: tuple[str, ...]) -> TemplateFit:
        if roles not in self._fits_of_roles:
            if len(self._fits_of_roles) >= MAX_CACHED_SHAPES:
                self._fits_of_roles.clear()
            messages = [{"role": role, "content": "text"} for role in roles]
            self._fits_of_roles[roles] = self._fit_of(Conversation(messages=messages, trained=()))
        return self._fits_of_roles[roles]

    def _fit_of(self, conversation: Conversation, form: MessageForm | None = None) -> TemplateFit:
        """Return how the template fits a conversation, in `form` or in the form that loses least."""
        units = split_into_units(conversation, self._template.tags)
        if form is None:
            form = merge_forms(self._fit_of_unit(conversation, unit, None).form for unit in units)
        return merge_fits([self._fit_of_unit(conversation, unit, form) for unit in units], form)

    def _fit_of_unit(self, conversation: Conversation, unit: TurnUnit, form: MessageForm | None) -> TemplateFit:
        key = (unit.key, form)
        if key not in self._fits:
            if len(self._fits) >= MAX_CACHED_SHAPES:
                self._fits.clear()
            example = shortest_example(conversation, unit)
            marked = mark_values(example.conversation, self._template.tags)
            fit = find_fit(self._template, marked, None if form is None else [form])
            self._fits[key] = None if fit is None else (fit, example.start)
        cached = self._fits[key]
        if cached is None:
            return TemplateFit(form=form or AS_WRITTEN, unknown=frozenset(range(unit.start, unit.end)))
        fit, start = cached
        return fit.for_unit(unit, start)

    def _check(self, conversation: Conversation, fit: TemplateFit) -> None:
        """Raise the error for the first dropped value that must not be lost."""
        for dropped in fit.dropped:
            is_trained = self._trains_all or dropped.value.index in conversation.trained
            if dropped.value.kind in (ValueKind.TOOL_DETAILS, ValueKind.OTHER):
                continue
            if dropped.value.kind in MAY_BE_DROPPED and (self._accepts_lost or not is_trained):
                continue
            if dropped.only_if_followed and is_trained and not self._trains_all:
                continue  # refused with a better hint when its span is determined
            value = (
                matching_value(dropped.value, mark_values(conversation, self._template.tags).values)
                if dropped.is_always
                else dropped.value
            )
            if value is not None:
                raise dropped_value_error(
                    dropped, value, conversation.messages, partial(self._find_fixes, conversation, value)
                )

    def _find_fixes(self, conversation: Conversation, value: Value) -> ReasoningFixes:
        def helps(switched: Conversation) -> bool:
            dropped = ((each.value.index, each.value.kind) for each in self._fit_of(switched).dropped)
            return (value.index, value.kind) not in dropped

        return ReasoningFixes(
            switch=self._template.helpful_switch(conversation, helps),
            writes_tags=not self._fit_of(WITH_REASONING).dropped,
        )

    def _shape_of(self, roles: tuple[str, ...], form: MessageForm) -> _Shape | None:
        """Return the text around contents; None if they do not all appear in the text, once and in order."""
        nonce, before, after = secrets.token_hex(8), _random_spaces("\v"), _random_spaces("\f")
        marks = [f"{nonce}-{index}-" for index in range(len(roles))]
        messages = [
            {"role": role, "content": f"{before}{mark}{after}"} for role, mark in zip(roles, marks, strict=True)
        ]
        conversation = form.apply(Conversation(messages=messages, trained=()))
        try:
            text = self._template.text(conversation)
            around = _split_at_marks(text, marks, before, after)
            if around is None:
                return None
            literals, trims = around
            edges = {}
            contents = [trim(message["content"]) for trim, message in zip(trims, messages, strict=True)]
            starts = _starts(literals, contents)
            for index, role in enumerate(roles):
                if role != "assistant" or index == 0:
                    continue
                start, end = self._template.span(conversation, index, text)
                edge = (start - starts[index], end - starts[index + 1])
                if not (0 <= edge[0] <= len(literals[index]) and 0 < edge[1] <= len(literals[index + 1])):
                    return None
                edges[index] = edge
        except RowError:  # reported when the row is rendered by itself
            return None
        return _Shape(literals=literals, trims=trims, edges=edges)


def _is_bare(message: Mapping[str, Any], trained: str) -> bool:
    """Return whether nothing follows the content of an answer."""
    content = message["content"].rstrip()
    return not message.get("tool_calls") and trained.count(content) == 1 and trained.endswith(content)


def _roles_of(conversation: Conversation) -> tuple[str, ...] | None:
    """Return the roles of plain messages; None if one has other keys, or reasoning in its content."""
    if not conversation.is_plain or any(message.keys() != PLAIN_KEYS for message in conversation.messages):
        return None
    roles = tuple(message["role"] for message in conversation.messages)
    has_reasoning = (
        REASONING_END in message["content"] for message in conversation.messages if message["role"] == "assistant"
    )
    return None if any(has_reasoning) else roles


def _random_spaces(edge: str) -> str:
    """Return spaces that no text contains by chance, between two that are `edge`."""
    return edge + "".join(secrets.choice(SPACES) for _ in range(NUM_SPACES)) + edge


def _split_at_marks(
    text: str, marks: Sequence[str], space_before: str, space_after: str
) -> tuple[tuple[str, ...], tuple[Trim, ...]] | None:
    """Return the text around the marks, and which of the spaces around each are gone.

    None if a mark is missing, repeated or out of order.
    """
    literals, trims = list[str](), list[Trim]()
    for each in marks:
        before, separator, text = text.partition(each)
        if not separator or each in text:
            return None
        trims.append(TRIMS[before.endswith(space_before), text.startswith(space_after)])
        literals.append(before.removesuffix(space_before))
        text = text.removeprefix(space_after)
    return (*literals, text), tuple(trims)


def _starts(literals: Sequence[str], contents: Sequence[str]) -> list[int]:
    """Return where each literal begins in the text."""
    starts, position = [0], 0
    for literal, content in zip(literals, contents, strict=False):
        position += len(literal) + len(content)
        starts.append(position)
    return starts
