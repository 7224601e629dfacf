"""Render conversations by the chat template: all that a row says is in its text, or the row is refused, or it is told.

What the template leaves out, and where the trained answers stand, is found with marks, once for each kind of message;
a row itself is looked at only where contents may make a difference.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_cli.data.rendering.dropped_values import MAY_BE_LOST, WaysOut, ends_no_turn, like, refusal
from qlora_cli.data.rendering.message_form import AS_THEY_ARE, Form, common_form
from qlora_cli.data.rendering.template import ChatTemplate, Span, beginning
from qlora_cli.data.rendering.template_fit import THOUGHT_END, TemplateFit, find_fit, joined, missing
from qlora_cli.data.rendering.turn_units import Unit, example_of, units_of
from qlora_cli.data.rendering.value_marks import Value, What, mark, without_key
from qlora_cli.data.rows.examples import PLAIN_KEYS, Conversation, RowError
from qlora_cli.events import Reporter
from qlora_cli.settings.choices import LossOn

THOUGHTFUL = Conversation(
    messages=[
        {"role": "user", "content": "text"},
        {"role": "assistant", "content": "<think>\ntext\n</think>\n\ntext"},
    ],
    trained=(),
)
MOST_SHAPES = 4096  # sequences of roles, and of roles and keys, that are remembered


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation as text, and the spans of characters that are trained, each to the end of its turn."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, kw_only=True)
class FittedTemplate:
    """A conversation as the row has it, and in the form that the template takes.

    `roles` are those of one with plain messages alone.
    """

    original: Conversation
    conversation: Conversation
    roles: tuple[str, ...] | None
    fit: TemplateFit


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """What a template writes around the contents of a sequence of roles.

    `literals` stand before, between and behind the contents. An answer begins so many characters into the literal
    before it, and its turn ends so many characters into the literal behind it, by the message's place.
    """

    literals: tuple[str, ...]
    edges: dict[int, tuple[int, int]]


class Renderer:
    """Renders by the chat template of `tokenizer`; `end_ids` are tokens at which generation stops.

    To render the beginnings of every conversation would cost several times what rendering it costs. Most
    conversations of a data set share a few sequences of roles, and most templates put the contents in as they are: so
    what stands around them is found once for each sequence. A row takes the short way only if its own rendering is
    exactly those pieces with its contents between them.

    Attributes:
        told: What was left out of rows that are used, and of how many.
        lost_keys: The keys of messages that no format knows, whose text was left out.
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
        self.told: Counter[What] = Counter()
        self.lost_keys: set[str] = set()
        self._template = ChatTemplate(tokenizer, end_ids, trains_last=loss_on == LossOn.LAST, reporter=reporter)
        self._trains_all = loss_on == LossOn.ALL
        self._accepts_lost = accepts_lost
        self._fits: dict[tuple[object, Form | None], tuple[TemplateFit, int] | None] = {}
        self._fits_of_roles: dict[tuple[str, ...], TemplateFit] = {}
        self._shapes: dict[tuple[str, ...], _Shape | None] = {}

    def fit(self, conversation: Conversation) -> FittedTemplate:
        """Return `conversation` in the form that the template takes.

        Raises:
            RowError: the template leaves out what must not be lost, whatever the form.
            ModelError: the template does not end.
        """
        roles = _roles_of(conversation)
        fit = self._fit_of(conversation) if roles is None else self._fit_of_roles(roles)
        self._check(conversation, fit)
        return FittedTemplate(original=conversation, conversation=fit.form.apply(conversation), roles=roles, fit=fit)

    def writes_key(self, key: str, rows: Sequence[Conversation]) -> bool:
        """Whether the text of any of `rows` depends on a key that no format knows: `KEY` or `tool_calls.KEY`."""
        return key not in self.lost_keys and any(self._depends_on(key, row) for row in rows)

    def reads_variable(self, name: str) -> bool:
        """Whether the template reads a variable of this name that a row may set."""
        return self._template.variables is None or name in self._template.variables

    def _depends_on(self, key: str, row: Conversation) -> bool:
        try:
            form = self.fit(row).fit.form
            text = self._template.text(form.apply(row))
        except RowError:  # it is refused, for which it has an error of its own
            return False
        try:
            return text != self._template.text(form.apply(without_key(row, key)))
        except RowError:  # of a template that asks for the key
            return True

    def texts(self, rows: Sequence[FittedTemplate]) -> list[str] | None:
        """Return plain conversations as texts, at less cost than one by one; None if one is refused.

        Raises:
            ModelError: the template does not end.
        """
        return self._template.texts([row.conversation for row in rows])

    def text(self, row: FittedTemplate) -> str:
        """Return a conversation as text.

        Raises:
            RowError: the template refuses it.
            ModelError: the template does not end.
        """
        return self._template.text(row.conversation)

    def render(self, row: FittedTemplate, text: str) -> Rendered:
        """Return a conversation, whose text is `text`, with the spans that are trained.

        Raises:
            RowError: an answer is first, or the template leaves out what must not be lost, renders a beginning of the
                row otherwise once more follows, or does not end a trained turn.
            ModelError: the template does not end.
        """
        self._template.pace.row_done()
        if not self._trains_all and not row.original.trained:
            return Rendered(text=text, spans=())
        if not self._trains_all and row.original.trained[0] == 0:
            raise RowError("the first message is the assistant's: there is nothing to answer")
        spans = self._by_shape(row, text)
        if spans is None:
            text, spans = self._by_row(row, text)
        return Rendered(text=text, spans=((0, len(text)),) if self._trains_all else tuple(spans.values()))

    def _by_shape(self, row: FittedTemplate, text: str) -> dict[int, Span] | None:
        """Return the spans of the trained answers of a row whose text is that of its shape with its contents."""
        if row.roles is None:
            return None
        if row.roles not in self._shapes:
            if len(self._shapes) >= MOST_SHAPES:
                self._shapes.clear()
            self._shapes[row.roles] = self._shape_of(row.roles, row.fit.form)
        shape = self._shapes[row.roles]
        if shape is None:
            return None
        contents = [message["content"] for message in row.original.messages]
        trained = () if self._trains_all else row.original.trained
        spans = _place(shape, contents, trained, text)
        if spans is None:  # templates of the Llama 3 family and others trim what they put in
            spans = _place(shape, [content.strip() for content in contents], trained, text)
        if spans and not self._template.asks_always_alike:
            for place, (start, _) in spans.items():
                if text[:start] != self._template.text(beginning(row.conversation, place), asks_answer=True):
                    return None
        return spans

    def _by_row(self, row: FittedTemplate, text: str) -> tuple[str, dict[int, Span]]:
        """Return the text of a row in which contents may change what the template writes, and the trained spans."""
        fit = row.fit
        if row.roles is not None:  # it is that of contents without tags
            fit = self._fit_of(row.original, row.fit.form)
            self._check(row.original, fit)
        trained = () if self._trains_all else row.original.trained
        spans = {place: self._template.span(row.conversation, place, text) for place in trained}
        found = TemplateFit(losses=tuple(missing(mark(row.original, self._template.tags).values, text, spans)))
        self._check(row.original, found)
        for place, span in spans.items():
            message = row.original.messages[place]
            is_bare = place in fit.unknown and _is_bare(message, text[slice(*span)])
            if is_bare or place in fit.endless:
                question = fit.form.message({"role": "user", "content": "more"})
                through = self._template.through_end_token(row.conversation, span, text, question)
                if through is None:
                    raise ends_no_turn(place, message)
                spans[place] = (span[0], len(through))
                text = text if text.startswith(through) else through
        self.told.update({loss.value.what for loss in (*found.losses, *fit.losses)} - {What.OTHER})
        self.lost_keys |= {loss.value.key for loss in fit.losses if loss.value.what == What.OTHER}
        return text, spans

    def _fit_of_roles(self, roles: tuple[str, ...]) -> TemplateFit:
        if roles not in self._fits_of_roles:
            if len(self._fits_of_roles) >= MOST_SHAPES:
                self._fits_of_roles.clear()
            messages = [{"role": role, "content": "text"} for role in roles]
            self._fits_of_roles[roles] = self._fit_of(Conversation(messages=messages, trained=()))
        return self._fits_of_roles[roles]

    def _fit_of(self, conversation: Conversation, form: Form | None = None) -> TemplateFit:
        """Return how the template takes a conversation, in one form or in that which loses least."""
        units = units_of(conversation, self._template.tags)
        if form is None:
            form = common_form(self._fit_of_unit(conversation, unit, None).form for unit in units)
        return joined([self._fit_of_unit(conversation, unit, form) for unit in units], form)

    def _fit_of_unit(self, conversation: Conversation, unit: Unit, form: Form | None) -> TemplateFit:
        key = (unit.key, form)
        if key not in self._fits:
            if len(self._fits) >= MOST_SHAPES:
                self._fits.clear()
            example = example_of(conversation, unit)
            marked = mark(example.conversation, self._template.tags)
            found = find_fit(self._template, marked, None if form is None else [form])
            self._fits[key] = None if found is None else (found, example.start)
        kept = self._fits[key]
        if kept is None:
            return TemplateFit(form=form or AS_THEY_ARE, unknown=frozenset(range(unit.start, unit.end)))
        fit, start = kept
        return fit.of_unit(unit, start)

    def _check(self, conversation: Conversation, fit: TemplateFit) -> None:
        """Raise the error for the first of the losses that must not be."""
        for loss in fit.losses:
            is_trained = self._trains_all or loss.value.place in conversation.trained
            if loss.value.what in (What.TOOL_DETAILS, What.OTHER):
                continue
            if loss.value.what in MAY_BE_LOST and (self._accepts_lost or not is_trained):
                continue
            if loss.once_followed and is_trained and not self._trains_all:
                continue  # which is refused with what to do when its span is looked for
            value = like(loss.value, mark(conversation, self._template.tags).values) if loss.is_of_all else loss.value
            if value is not None:
                raise refusal(loss, value, conversation.messages, partial(self._ways_out, conversation, value))

    def _ways_out(self, conversation: Conversation, value: Value) -> WaysOut:
        def helps(switched: Conversation) -> bool:
            found = ((loss.value.place, loss.value.what) for loss in self._fit_of(switched).losses)
            return (value.place, value.what) not in found

        return WaysOut(
            switch=self._template.switch_that_helps(conversation, helps),
            writes_thoughts=not self._fit_of(THOUGHTFUL).losses,
        )

    def _shape_of(self, roles: tuple[str, ...], form: Form) -> _Shape | None:
        """Return what the template writes around contents; None if they are not all in the text, once, in order."""
        marks = [f"Mark{place}Of{len(roles)}" for place in range(len(roles))]
        messages = [{"role": role, "content": text} for role, text in zip(roles, marks, strict=True)]
        given = form.apply(Conversation(messages=messages, trained=()))
        try:
            text = self._template.text(given)
            literals = _cut(text, marks)
            if literals is None:
                return None
            edges = {}
            starts = _starts(literals, marks)
            for place, role in enumerate(roles):
                if role != "assistant" or place == 0:
                    continue
                start, end = self._template.span(given, place, text)
                edge = (start - starts[place], end - starts[place + 1])
                if not (0 <= edge[0] <= len(literals[place]) and 0 < edge[1] <= len(literals[place + 1])):
                    return None
                edges[place] = edge
        except RowError:  # such a row takes the long way, where it is named
            return None
        return _Shape(literals=tuple(literals), edges=edges)


def _is_bare(message: Mapping[str, Any], trained: str) -> bool:
    """Whether nothing stands behind the content of an answer."""
    content = message["content"].rstrip()
    return not message.get("tool_calls") and trained.count(content) == 1 and trained.endswith(content)


def _roles_of(conversation: Conversation) -> tuple[str, ...] | None:
    """Return the roles of plain messages; None where one has more, be it a thought within its content."""
    if not conversation.is_plain or any(message.keys() != PLAIN_KEYS for message in conversation.messages):
        return None
    roles = tuple(message["role"] for message in conversation.messages)
    thinks = (THOUGHT_END in message["content"] for message in conversation.messages if message["role"] == "assistant")
    return None if any(thinks) else roles


def _cut(text: str, marks: Sequence[str]) -> list[str] | None:
    """Return what stands around the marks; None if one is missing, twice there or out of order."""
    literals = []
    for each in marks:
        before, found, text = text.partition(each)
        if not found or each in text:
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


def _place(shape: _Shape, contents: Sequence[str], trained: Sequence[int], text: str) -> dict[int, Span] | None:
    """Return the spans of the trained answers if `text` is the shape with these contents."""
    pieces = [piece for pair in zip(shape.literals, contents, strict=False) for piece in pair]
    if "".join(pieces) + shape.literals[-1] != text:
        return None
    ends = list(itertools.accumulate(map(len, pieces)))  # of each literal, and of the content behind it
    return {
        place: (
            ends[2 * place] - len(shape.literals[place]) + shape.edges[place][0],
            ends[2 * place + 1] + shape.edges[place][1],
        )
        for place in trained
    }
