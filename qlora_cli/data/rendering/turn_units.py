"""Take a conversation apart into the units that a template treats by themselves.

Traces of agents call tools dozens of times, and hardly two of them have the same sequence of calls. But a template
writes a call with its results as it writes others that hold the same keys and stand at the same side of the last
question. So each unit is tried once, in the shortest conversation that it may stand in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from re import Pattern
from typing import Any

from qlora_cli.data.rendering.value_marks import kind_of, mark_tools
from qlora_cli.data.rows.examples import Conversation

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Messages of a conversation: what comes before the first question, a question, or an answer with tool results.

    Attributes:
        start: The place of the first of them.
        end: The place behind the last.
        key: Equal for units that a template treats alike.
    """

    start: int
    end: int
    key: tuple[object, ...]


@dataclass(frozen=True, kw_only=True)
class Example:
    """The shortest conversation that a unit may stand in, and its place there."""

    conversation: Conversation
    start: int


def units_of(conversation: Conversation, tags: Pattern[str]) -> list[Unit]:
    """Return the units of a conversation; `tags` tell the kinds of contents apart."""
    messages = conversation.messages
    questions = [place for place, message in enumerate(messages) if message["role"] == "user"]
    first, last = (questions[0], questions[-1]) if questions else (0, 0)
    head = tuple(kind_of(message, tags) for message in messages[:first])
    around = (head, repr(mark_tools(conversation, tags)), repr(conversation.template_kwargs))
    starts = [0] if first else []
    starts += [place for place in range(first, len(messages)) if place == first or messages[place]["role"] != "tool"]
    return [
        Unit(
            start=start,
            end=end,
            key=(*around, start >= last, end == len(messages), *(kind_of(each, tags) for each in messages[start:end])),
        )
        for start, end in zip(starts, [*starts[1:], len(messages)], strict=True)
    ]


def example_of(conversation: Conversation, unit: Unit) -> Example:
    """Return the shortest conversation that `unit` of `conversation` may stand in."""
    messages = conversation.messages
    asked = next((place for place, message in enumerate(messages) if message["role"] == "user"), 0)
    own, before, behind = messages[unit.start : unit.end], messages[:asked], _rest(messages, unit)
    if unit.start < asked:
        before = []
    elif own[0]["role"] != "user":
        before = [*before, {"role": "user", "content": "text"}]
    return Example(conversation=replace(conversation, messages=[*before, *own, *behind]), start=len(before))


def _rest(messages: Sequence[Message], unit: Unit) -> list[Message]:
    """Return what follows a unit at least."""
    question, answer = {"role": "user", "content": "text"}, {"role": "assistant", "content": "text"}
    rest = messages[unit.end :]
    if not rest:
        return []
    if all(message["role"] != "user" for message in rest):
        return [answer]
    is_answered = messages[unit.end - 1]["role"] == "assistant"
    return [question, answer] if is_answered or rest[0]["role"] == "user" else [answer, question, answer]
