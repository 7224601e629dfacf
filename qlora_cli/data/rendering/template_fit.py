"""How a chat template takes conversations with the same roles and keys: in which form, and what it leaves out of them.

The form that loses least is taken. What is lost then, and which answers end no turn, is found with marks.
"""

import html
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_cli.data.rendering.message_form import AS_THEY_ARE, Form, forms_for
from qlora_cli.data.rendering.template import ChatTemplate, Span, beginning
from qlora_cli.data.rendering.turn_units import Unit
from qlora_cli.data.rendering.value_marks import Marked, Value, What, arguments_of
from qlora_cli.data.rows.examples import Conversation, RowError

PLAIN, MORE = "MarkPlainQ", "MarkMoreQ"
THOUGHT_END = "</think>"
# What quoting adds to a text or takes from it: JSON's and Python's escapes, quotes and spaces.
CODED = re.compile(r"(?:\\+u[0-9a-fA-F]{4})+|\\+x[0-9a-fA-F]{2}")
QUOTING = re.compile(r"\\+[abfnrtv0]?|[\s\"'\u0000-\u001f]+")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A value that is not in the text of its own message.

    Attributes:
        is_of_all: It is missing in all rows with the same roles and keys, not in this one for what it holds.
        is_served: The answer that it is missing in is otherwise rendered as it would be served.
        once_followed: It is there until another message follows.
        as_answer: It is there as if the assistant had said it.
    """

    value: Value
    is_of_all: bool = False
    is_served: bool = True
    once_followed: bool = False
    as_answer: bool = False


@dataclass(frozen=True, kw_only=True)
class TemplateFit:
    """How a template takes the conversations of one sequence of roles and keys.

    Attributes:
        losses: What it leaves out of them.
        endless: The places of answers behind which it writes nothing that ends a turn.
        unknown: The places of messages of which nothing is known, as it refuses marks for their values.
    """

    form: Form = AS_THEY_ARE
    losses: tuple[Loss, ...] = ()
    endless: frozenset[int] = frozenset()
    unknown: frozenset[int] = frozenset()

    def of_unit(self, unit: Unit, start: int) -> "TemplateFit":
        """Return what is so of a unit that stands in an example from `start`, by its places in the whole."""
        shift, end = unit.start - start, start + unit.end - unit.start
        losses = (
            replace(loss, value=replace(value, place=value.place + shift)) if value.place is not None else loss
            for loss in self.losses
            for value in (loss.value,)
            if value.place is None or start <= value.place < end
        )
        endless = (place + shift for place in self.endless if start <= place < end)
        return replace(self, losses=tuple(losses), endless=frozenset(endless))


def joined(fits: Sequence[TemplateFit], form: Form) -> TemplateFit:
    """Return what is so of a conversation in whose units each is so."""
    return TemplateFit(
        form=form,
        losses=tuple(dict.fromkeys(loss for fit in fits for loss in fit.losses)),
        endless=frozenset().union(*(fit.endless for fit in fits)),
        unknown=frozenset().union(*(fit.unknown for fit in fits)),
    )


def find_fit(template: ChatTemplate, marked: Marked, forms: Iterable[Form] | None = None) -> TemplateFit | None:
    """Return how `template` takes a conversation with marks; None if it refuses marks in any of the `forms`.

    Raises:
        ModelError: the template does not end.
    """
    if forms is None:
        forms = forms_for(marked.conversation, knows_developer="developer" in template.source)
    best: tuple[int, Form, Conversation, str] | None = None
    for form in forms:
        given = form.apply(marked.conversation)
        try:
            text = template.text(given)
        except RowError:
            continue
        num_wrong = _num_wrong(marked, given, text)
        if best is None or num_wrong < best[0]:
            best = num_wrong, form, given, text
        if num_wrong == 0:
            break
    if best is None:
        return None
    _, form, given, text = best
    spans = _spans(template, given, text)
    return TemplateFit(
        form=form,
        losses=(*_losses(template, given, text, spans, marked.marks), *_mistaken(template, given, text, marked.marks)),
        endless=frozenset(
            place
            for place, span in spans.items()
            if span is not None and not _ends(template, form, given, text[slice(*span)], place, marked.marks)
        ),
    )


def missing(values: Iterable[Value], text: str, spans: Mapping[int, Span]) -> Iterator[Loss]:
    """Yield the values of a row that are not in its text: of trained answers in their spans, of others around them."""
    for value in values:
        place = value.place
        if place is not None and place in spans:
            is_there = is_written(value.text, text[slice(*spans[place])])
        else:
            is_there = is_written(value.text, text[slice(*_around(place, spans))], in_any_case=True)
        if not is_there and value.what != What.OTHER:
            yield Loss(value=value)


def _around(place: int | None, spans: Mapping[int, Span]) -> tuple[int, int | None]:
    """Return the part of a text in which a message that is not trained may stand; systems and tools before any."""
    if place is None:
        return 0, None
    before = next((start for answer, (start, _) in spans.items() if answer > place), None)
    behind = max((end for answer, (_, end) in spans.items() if answer < place), default=0)
    return behind, before


def is_written(value: str, text: str, *, in_any_case: bool = False) -> bool:
    """Whether `value` stands in `text`: as it is, or quoted and spaced in another way."""
    value = value.strip()
    if value in text or value in html.unescape(text):
        return True
    value, text = _unquoted(value), _unquoted(text)
    return value in text or (in_any_case and value.casefold() in text.casefold())


def _unquoted(text: str) -> str:
    """Return a text without what JSON, Python and templates write of it in different ways."""
    return QUOTING.sub("", CODED.sub(_decoded, text))


def _decoded(code: re.Match[str]) -> str:
    escapes = re.sub(r"\\+x", r"\\u00", re.sub(r"\\+u", r"\\u", code[0]))
    return str(json.loads(f'"{escapes}"'))


def _num_wrong(marked: Marked, given: Conversation, text: str) -> int:
    """Return how many values a text lacks, or has as Python prints them, and how many thoughts it has of its own."""
    num_missing = sum(value.text not in text for value in marked.marks if value.what != What.OTHER)
    printed: list[Any] = [message["content"] for message in given.messages if isinstance(message["content"], list)]
    printed += [
        each for message in given.messages for each in arguments_of(message) if isinstance(each, dict) and each
    ]
    num_thoughts = sum(message["content"].count(THOUGHT_END) for message in marked.conversation.messages)
    num_added = text.count(THOUGHT_END) - num_thoughts if num_thoughts else 0
    return num_missing + sum(str(each) in text for each in printed) + max(0, num_added)


def _mistaken(template: ChatTemplate, given: Conversation, text: str, marks: Iterable[Value]) -> Iterator[Loss]:
    """Yield the contents of messages that a template writes as answers: it does not know their roles."""
    for value in marks:
        place = value.place
        if place is None or value.what != What.CONTENT or given.messages[place]["role"] in ("user", "assistant"):
            continue
        messages = list(given.messages)
        messages[place] = {**messages[place], "role": "assistant"}
        if _text_or_nothing(template, replace(given, messages=messages)) == text:
            yield Loss(value=value, is_of_all=True, as_answer=True)


def _spans(template: ChatTemplate, given: Conversation, text: str) -> dict[int, Span | None]:
    """Return where each answer stands, by its place; None where it is not rendered as it would be served."""
    spans: dict[int, Span | None] = {}
    for place, message in enumerate(given.messages):
        if message["role"] == "assistant":
            try:
                spans[place] = template.span(given, place, text)
            except RowError:
                spans[place] = None
    return spans


def _losses(
    template: ChatTemplate, given: Conversation, text: str, spans: Mapping[int, Span | None], marks: Iterable[Value]
) -> Iterator[Loss]:
    for value in marks:
        span = spans.get(value.place) if value.place is not None else None
        if value.text in (text if span is None else text[slice(*span)]):
            continue
        followed = value.place is not None and value.place + 1 < len(given.messages)
        yield Loss(
            value=value,
            is_of_all=True,
            is_served=value.place not in spans or span is not None,
            once_followed=followed and _is_in_beginning(template, given, value),
        )


def _is_in_beginning(template: ChatTemplate, given: Conversation, value: Value) -> bool:
    assert value.place is not None
    return value.text in _text_or_nothing(template, beginning(given, value.place + 1))


def _ends(
    template: ChatTemplate, form: Form, given: Conversation, answer: str, place: int, marks: Iterable[Value]
) -> bool:
    """Whether something stands behind an answer that the model can learn to stop with."""
    own = [value.text for value in marks if value.place == place and value.text in answer]
    if not own:  # all of it is lost
        return True
    last = max(own, key=answer.rindex)
    behind = answer[answer.rindex(last) + len(last) :].rstrip()
    message = given.messages[place]
    if not message.get("tool_calls"):
        return bool(behind)
    # What closes a call is no end: it stands behind each of several.
    behind = behind.removeprefix(_closing(template, given, place, last, behind))
    plain = form.message({"role": "assistant", "content": PLAIN})
    end = _text_or_nothing(template, _with(given, place, plain)).partition(PLAIN)[2].rstrip()
    return template.has_token(behind) or (end != "" and behind.endswith(end))


def _closing(template: ChatTemplate, given: Conversation, place: int, last: str, behind: str) -> str:
    """Return what of the text behind a last call, which ends with the mark `last`, stands there before others too."""
    message = given.messages[place]
    call = message["tool_calls"][-1]
    more = {**call, "function": {**call["function"], "name": MORE}}
    several = _with(given, place, {**message, "tool_calls": [*message["tool_calls"], more]})
    text, is_written, _ = _text_or_nothing(template, several).partition(MORE)
    if not is_written:  # it takes one call, and passes over others
        return ""
    pairs = zip(template.pieces(behind), template.pieces(text.partition(last)[2]), strict=False)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1] and pair[0] not in template.ends, pairs)
    return "".join(ours for ours, _ in same)


def _text_or_nothing(template: ChatTemplate, conversation: Conversation) -> str:
    """Return a conversation as text; nothing if the template refuses it, as some do several calls at once."""
    try:
        return template.text(conversation)
    except RowError:
        return ""


def _with(given: Conversation, place: int, message: dict[str, Any]) -> Conversation:
    return replace(given, messages=[*given.messages[:place], message])
