"""Determine how a chat template fits conversations: the form of messages that it accepts, and the values it drops.

The form that loses least is chosen. Dropped values and answers without an end of turn are then found with marks.
"""

import html
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_cli.data.rendering.message_form import AS_WRITTEN, MessageForm, candidate_forms
from qlora_cli.data.rendering.template import ChatTemplate, Span, first_messages
from qlora_cli.data.rendering.turn_units import TurnUnit
from qlora_cli.data.rendering.value_marks import MarkedConversation, Value, ValueKind, arguments_of
from qlora_cli.data.rows.examples import Conversation, RowError

PLAIN, MORE = "MarkPlainQ", "MarkMoreQ"
REASONING_END = "</think>"
# Characters that quoting adds or changes: the escapes of JSON and Python, quotes and spaces.
ESCAPES = re.compile(r"(?:\\+u[0-9a-fA-F]{4})+|\\+x[0-9a-fA-F]{2}")
QUOTING = re.compile(r"\\+[abfnrtv0]?|[\s\"'\u0000-\u001f]+")


@dataclass(frozen=True, kw_only=True)
class DroppedValue:
    """A value that is not in the text of its message.

    Attributes:
        is_always: It is missing in all rows with the same roles and keys, not only because of this value.
        is_served: The answer that lacks it is otherwise rendered as it would be served.
        only_if_followed: It is missing only when another message follows.
        as_answer: It is rendered as if the assistant had said it.
    """

    value: Value
    is_always: bool = False
    is_served: bool = True
    only_if_followed: bool = False
    as_answer: bool = False


@dataclass(frozen=True, kw_only=True)
class TemplateFit:
    """How a template fits the conversations of one sequence of roles and keys.

    Attributes:
        dropped: The values that it leaves out.
        unterminated: The indices of answers after which it writes no end of turn.
        unknown: The indices of messages of which nothing is known, because it refuses marks for their values.
    """

    form: MessageForm = AS_WRITTEN
    dropped: tuple[DroppedValue, ...] = ()
    unterminated: frozenset[int] = frozenset()
    unknown: frozenset[int] = frozenset()

    def for_unit(self, unit: TurnUnit, start: int) -> "TemplateFit":
        """Return the fit of a unit that begins at `start` in its example, with indices of the whole conversation."""
        shift, end = unit.start - start, start + unit.end - unit.start
        dropped = (
            replace(loss, value=replace(value, index=value.index + shift)) if value.index is not None else loss
            for loss in self.dropped
            for value in (loss.value,)
            if value.index is None or start <= value.index < end
        )
        unterminated = (index + shift for index in self.unterminated if start <= index < end)
        return replace(self, dropped=tuple(dropped), unterminated=frozenset(unterminated))


def merge_fits(fits: Sequence[TemplateFit], form: MessageForm) -> TemplateFit:
    """Return the fit of a conversation from those of its units."""
    return TemplateFit(
        form=form,
        dropped=tuple(dict.fromkeys(loss for fit in fits for loss in fit.dropped)),
        unterminated=frozenset().union(*(fit.unterminated for fit in fits)),
        unknown=frozenset().union(*(fit.unknown for fit in fits)),
    )


def find_fit(
    template: ChatTemplate, marked: MarkedConversation, forms: Iterable[MessageForm] | None = None
) -> TemplateFit | None:
    """Return how `template` fits a conversation with marks; None if it refuses them in all of the `forms`.

    Raises:
        ModelError: the template does not end.
    """
    if forms is None:
        forms = candidate_forms(marked.conversation, knows_developer="developer" in template.source)
    best: tuple[int, MessageForm, Conversation, str] | None = None
    for form in forms:
        conversation = form.apply(marked.conversation)
        try:
            text = template.text(conversation)
        except RowError:
            continue
        num_defects = _num_defects(marked, conversation, text)
        if best is None or num_defects < best[0]:
            best = num_defects, form, conversation, text
        if num_defects == 0:
            break
    if best is None:
        return None
    _, form, conversation, text = best
    spans = _spans(template, conversation, text)
    return TemplateFit(
        form=form,
        dropped=(
            *_dropped_marks(template, conversation, text, spans, marked.marks),
            *_unknown_roles(template, conversation, text, marked.marks),
        ),
        unterminated=frozenset(
            index
            for index, span in spans.items()
            if span is not None
            and not _has_turn_end(template, form, conversation, text[slice(*span)], index, marked.marks)
        ),
    )


def dropped_values(values: Iterable[Value], text: str, spans: Mapping[int, Span]) -> Iterator[DroppedValue]:
    """Yield the values of a row that its text lacks: those of trained answers in their spans, others around these."""
    for value in values:
        index = value.index
        if index is not None and index in spans:
            is_present = is_written(value.text, text[slice(*spans[index])])
        else:
            is_present = is_written(value.text, text[slice(*_around(index, spans))], in_any_case=True)
        if not is_present and value.kind != ValueKind.OTHER:
            yield DroppedValue(value=value)


def _around(index: int | None, spans: Mapping[int, Span]) -> tuple[int, int | None]:
    """Return the range of a text that an untrained message may be in; system prompts and tools may be anywhere."""
    if index is None:
        return 0, None
    before = next((start for answer, (start, _) in spans.items() if answer > index), None)
    after = max((end for answer, (_, end) in spans.items() if answer < index), default=0)
    return after, before


def is_written(value: str, text: str, *, in_any_case: bool = False) -> bool:
    """Return whether `text` contains `value`, unchanged or with other quoting and spacing."""
    value = value.strip()
    if value in text or value in html.unescape(text):
        return True
    value, text = _normalize_quoting(value), _normalize_quoting(text)
    return value in text or (in_any_case and value.casefold() in text.casefold())


def _normalize_quoting(text: str) -> str:
    """Return a text without the escapes, quotes and spaces in which JSON, Python and templates differ."""
    return QUOTING.sub("", ESCAPES.sub(_decode_escapes, text))


def _decode_escapes(code: re.Match[str]) -> str:
    escapes = re.sub(r"\\+x", r"\\u00", re.sub(r"\\+u", r"\\u", code[0]))
    return str(json.loads(f'"{escapes}"'))


def _num_defects(marked: MarkedConversation, conversation: Conversation, text: str) -> int:
    """Return the number of values that a text lacks, or has as Python objects, and of reasoning blocks it adds."""
    num_missing = sum(value.text not in text for value in marked.marks if value.kind != ValueKind.OTHER)
    objects: list[Any] = [
        message["content"] for message in conversation.messages if isinstance(message["content"], list)
    ]
    objects += [
        each for message in conversation.messages for each in arguments_of(message) if isinstance(each, dict) and each
    ]
    num_own = sum(message["content"].count(REASONING_END) for message in marked.conversation.messages)
    num_added = text.count(REASONING_END) - num_own if num_own else 0
    return num_missing + sum(str(each) in text for each in objects) + max(0, num_added)


def _unknown_roles(
    template: ChatTemplate, conversation: Conversation, text: str, marks: Iterable[Value]
) -> Iterator[DroppedValue]:
    """Yield the contents of messages that a template renders as answers, because it does not know their roles."""
    for value in marks:
        index = value.index
        if (
            index is None
            or value.kind != ValueKind.CONTENT
            or conversation.messages[index]["role"] in ("user", "assistant")
        ):
            continue
        messages = list(conversation.messages)
        messages[index] = {**messages[index], "role": "assistant"}
        if _text_or_empty(template, replace(conversation, messages=messages)) == text:
            yield DroppedValue(value=value, is_always=True, as_answer=True)


def _spans(template: ChatTemplate, conversation: Conversation, text: str) -> dict[int, Span | None]:
    """Return the span of each answer by its index; None if it is not rendered as it would be served."""
    spans: dict[int, Span | None] = {}
    for index, message in enumerate(conversation.messages):
        if message["role"] == "assistant":
            try:
                spans[index] = template.span(conversation, index, text)
            except RowError:
                spans[index] = None
    return spans


def _dropped_marks(
    template: ChatTemplate,
    conversation: Conversation,
    text: str,
    spans: Mapping[int, Span | None],
    marks: Iterable[Value],
) -> Iterator[DroppedValue]:
    for value in marks:
        span = spans.get(value.index) if value.index is not None else None
        if value.text in (text if span is None else text[slice(*span)]):
            continue
        followed = value.index is not None and value.index + 1 < len(conversation.messages)
        yield DroppedValue(
            value=value,
            is_always=True,
            is_served=value.index not in spans or span is not None,
            only_if_followed=followed and _is_in_beginning(template, conversation, value),
        )


def _is_in_beginning(template: ChatTemplate, conversation: Conversation, value: Value) -> bool:
    assert value.index is not None
    return value.text in _text_or_empty(template, first_messages(conversation, value.index + 1))


def _has_turn_end(
    template: ChatTemplate,
    form: MessageForm,
    conversation: Conversation,
    answer: str,
    index: int,
    marks: Iterable[Value],
) -> bool:
    """Return whether an answer is followed by an end of turn that the model can learn to stop with."""
    own = [value.text for value in marks if value.index == index and value.text in answer]
    if not own:  # all of its values are dropped
        return True
    last = max(own, key=answer.rindex)
    after = answer[answer.rindex(last) + len(last) :].rstrip()
    message = conversation.messages[index]
    if not message.get("tool_calls"):
        return bool(after)
    # The text that closes a call does not end the turn: it follows each of several calls.
    after = after.removeprefix(_call_closing(template, conversation, index, last, after))
    plain = form.message({"role": "assistant", "content": PLAIN})
    end = _text_or_empty(template, _with_last(conversation, index, plain)).partition(PLAIN)[2].rstrip()
    return template.has_added_token(after) or (end != "" and after.endswith(end))


def _call_closing(template: ChatTemplate, conversation: Conversation, index: int, last: str, after: str) -> str:
    """Return the text that closes a call: what follows the mark `last` both before another call and at the end."""
    message = conversation.messages[index]
    call = message["tool_calls"][-1]
    more = {**call, "function": {**call["function"], "name": MORE}}
    several = _with_last(conversation, index, {**message, "tool_calls": [*message["tool_calls"], more]})
    text, is_written, _ = _text_or_empty(template, several).partition(MORE)
    if not is_written:  # it renders only one call
        return ""
    pairs = zip(template.pieces(after), template.pieces(text.partition(last)[2]), strict=False)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1] and pair[0] not in template.end_tokens, pairs)
    return "".join(ours for ours, _ in same)


def _text_or_empty(template: ChatTemplate, conversation: Conversation) -> str:
    """Render a conversation; return an empty text if the template refuses it, as some refuse parallel calls."""
    try:
        return template.text(conversation)
    except RowError:
        return ""


def _with_last(conversation: Conversation, index: int, message: dict[str, Any]) -> Conversation:
    return replace(conversation, messages=[*conversation.messages[:index], message])
