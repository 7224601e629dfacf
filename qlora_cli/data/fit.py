"""How a chat template takes conversations of the same roles and keys: in which form, and what it leaves out of them.

Templates differ in what they take: contents as text or as lists of parts, arguments of calls as objects or as JSON
text, reasoning under one key or another, `developer` as a role of its own or none. The form that loses least is taken.
"""

import html
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_cli.data.marks import Marked, Value, arguments_of
from qlora_cli.data.rows import REASONING_KEYS, Conversation, RowError
from qlora_cli.data.template import ChatTemplate, Span, beginning
from qlora_cli.data.units import Unit

WORDS = re.compile(r"\w+|[^\w\s]")
PLAIN, MORE = "MarkPlainQ", "MarkMoreQ"


@dataclass(frozen=True, kw_only=True)
class Form:
    """The form in which a template is given messages.

    Attributes:
        roles_in_parts: The roles whose contents are lists of parts.
        arguments_as_text: The arguments of calls are JSON text.
        reasoning_key: The key of reasoning, whatever the row calls it; None leaves it.
        has_developer: `developer` is a role; without, it is `system`.
    """

    roles_in_parts: frozenset[str] = frozenset()
    arguments_as_text: bool = False
    reasoning_key: str | None = None
    has_developer: bool = True

    def apply(self, conversation: Conversation) -> Conversation:
        """Return `conversation` in this form."""
        if self == AS_THEY_ARE:
            return conversation
        return replace(conversation, messages=[self.message(message) for message in conversation.messages])

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message in this form."""
        given = dict(message)
        if given["role"] in self.roles_in_parts:
            given["content"] = [{"type": "text", "text": given["content"]}]
        if self.arguments_as_text and given.get("tool_calls"):
            given["tool_calls"] = [_with_text(call) for call in given["tool_calls"]]
        if self.reasoning_key is not None:
            given = {self.reasoning_key if key in REASONING_KEYS else key: value for key, value in given.items()}
        if not self.has_developer and given["role"] == "developer":
            given["role"] = "system"
        return given

    @property
    def num_changes(self) -> int:
        """In how many respects it is not as rows are written."""
        return sum(
            (
                bool(self.roles_in_parts),
                self.arguments_as_text,
                self.reasoning_key is not None,
                not self.has_developer,
            )
        )


AS_THEY_ARE = Form()


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A value that is not in the text of its own message.

    Attributes:
        is_of_all: It is missing in all rows with the same roles and keys, not in this one for what it holds.
        is_served: The answer that it is missing in is otherwise rendered as it would be served.
        once_followed: It is there until another message follows.
    """

    value: Value
    is_of_all: bool = False
    is_served: bool = True
    once_followed: bool = False


@dataclass(frozen=True, kw_only=True)
class Fit:
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

    def of_unit(self, unit: Unit, start: int) -> "Fit":
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


def joined(fits: Sequence[Fit], form: Form) -> Fit:
    """Return what is so of a conversation in whose units each is so."""
    return Fit(
        form=form,
        losses=tuple(dict.fromkeys(loss for fit in fits for loss in fit.losses)),
        endless=frozenset().union(*(fit.endless for fit in fits)),
        unknown=frozenset().union(*(fit.unknown for fit in fits)),
    )


def common_form(fits: Iterable[Fit]) -> Form:
    """Return the form that has what each of several needs."""
    forms = [fit.form for fit in fits]
    return Form(
        roles_in_parts=frozenset().union(*(form.roles_in_parts for form in forms)),
        arguments_as_text=any(form.arguments_as_text for form in forms),
        reasoning_key=next((form.reasoning_key for form in forms if form.reasoning_key), None),
        has_developer=all(form.has_developer for form in forms),
    )


def find_fit(template: ChatTemplate, marked: Marked, forms: Iterable[Form] | None = None) -> Fit | None:
    """Return how `template` takes a conversation with marks; None if it refuses marks in any of the `forms`.

    Raises:
        ModelError: the template does not end.
    """
    best: tuple[int, Form, Conversation, str] | None = None
    for form in forms if forms is not None else _forms(marked.conversation):
        given = form.apply(marked.conversation)
        try:
            text = template.text(given)
        except RowError:
            continue
        num_missing = sum(value.text not in text for value in marked.marks) + _num_as_python(given, text)
        if best is None or num_missing < best[0]:
            best = num_missing, form, given, text
        if num_missing == 0:
            break
    if best is None:
        return None
    _, form, given, text = best
    spans = _spans(template, given, text)
    return Fit(
        form=form,
        losses=tuple(_losses(template, given, text, spans, marked.marks)),
        endless=frozenset(
            place
            for place, span in spans.items()
            if span is not None and not _ends(template, form, given, text[slice(*span)], place, marked.marks)
        ),
    )


def missing(values: Iterable[Value], text: str, spans: Mapping[int, Span | None]) -> Iterator[Loss]:
    """Yield the values of a row that are not in its text, or in the span of their message if that is known."""
    for value in values:
        span = spans.get(value.place) if value.place is not None else None
        if not is_written(value.text, text if span is None else text[slice(*span)]):
            yield Loss(value=value)


def is_written(value: str, text: str) -> bool:
    """Whether `value` stands in `text`: as it is, as JSON or HTML write it, or with other spaces."""
    value = value.strip()
    if value in text:
        return True
    once = [json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]]
    twice = [json.dumps(each, ensure_ascii=False)[1:-1] for each in once]  # arguments that are JSON text, in JSON
    if any(each in text for each in (*once, *twice)) or value in html.unescape(text):
        return True
    words = iter(WORDS.findall(text))
    return all(word in words for word in WORDS.findall(value))


def _forms(conversation: Conversation) -> list[Form]:
    """Return the forms that make a difference to a conversation, those nearest to how rows are written first."""
    roles = frozenset(message["role"] for message in conversation.messages)
    keys = {key for message in conversation.messages for key in message if key in REASONING_KEYS}
    has_objects = any(
        isinstance(arguments, dict) for message in conversation.messages for arguments in arguments_of(message)
    )
    respects = itertools.product(
        dict.fromkeys((frozenset[str](), roles, roles - {"system"}, roles & {"user"})),
        (False, True) if has_objects else (False,),
        (None, *(key for key in REASONING_KEYS if keys - {key})) if keys else (None,),
        (True, False) if "developer" in roles else (True,),
    )
    forms = [
        Form(roles_in_parts=parts, arguments_as_text=as_text, reasoning_key=key, has_developer=has_developer)
        for parts, as_text, key, has_developer in respects
    ]
    return sorted(forms, key=lambda form: form.num_changes)


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}}


def _num_as_python(given: Conversation, text: str) -> int:
    """Return how many calls have arguments that the template writes as Python does, in single quotes."""
    written = (arguments for message in given.messages for arguments in arguments_of(message))
    return sum(isinstance(each, dict) and bool(each) and str(each) in text for each in written)


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
    return "".join(ours for ours, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _text_or_nothing(template: ChatTemplate, conversation: Conversation) -> str:
    """Return a conversation as text; nothing if the template refuses it, as some do several calls at once."""
    try:
        return template.text(conversation)
    except RowError:
        return ""


def _with(given: Conversation, place: int, message: dict[str, Any]) -> Conversation:
    return replace(given, messages=[*given.messages[:place], message])
