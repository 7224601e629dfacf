"""Split a conversation into units that a template renders independently of each other.

Agent traces call tools dozens of times, and hardly two of them have the same sequence of calls. But a template renders
a call with its results like others that have the same keys and are on the same side of the last question. So each unit
is tested once, in the shortest conversation that it may appear in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from re import Pattern
from typing import Any

from qlora_cli.data.rendering.value_marks import mark_tools, message_shape
from qlora_cli.data.rows.examples import Conversation

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TurnUnit:
    """Messages of a conversation: those before the first question, a question, or an answer with its tool results.

    Attributes:
        start: The index of the first message.
        end: The index after the last message.
        key: Equal for units that a template renders alike.
    """

    start: int
    end: int
    key: tuple[object, ...]


@dataclass(frozen=True, kw_only=True)
class UnitExample:
    """The shortest conversation that a unit may appear in, and the index at which it starts."""

    conversation: Conversation
    start: int


def split_into_units(conversation: Conversation, tags: Pattern[str]) -> list[TurnUnit]:
    """Return the units of a conversation; `tags` distinguish kinds of contents."""
    messages = conversation.messages
    questions = [index for index, message in enumerate(messages) if message["role"] == "user"]
    first, last = (questions[0], questions[-1]) if questions else (0, 0)
    head = tuple(message_shape(message, tags) for message in messages[:first])
    around = (head, repr(mark_tools(conversation, tags)), repr(conversation.template_kwargs))
    starts = [0] if first else []
    starts += [index for index in range(first, len(messages)) if index == first or messages[index]["role"] != "tool"]
    return [
        TurnUnit(
            start=start,
            end=end,
            key=(
                *around,
                start >= last,
                end == len(messages),
                *(message_shape(each, tags) for each in messages[start:end]),
            ),
        )
        for start, end in zip(starts, [*starts[1:], len(messages)], strict=True)
    ]


def shortest_example(conversation: Conversation, unit: TurnUnit) -> UnitExample:
    """Return the shortest conversation that `unit` of `conversation` may appear in."""
    messages = conversation.messages
    first_question = next((index for index, message in enumerate(messages) if message["role"] == "user"), 0)
    own, before, after = messages[unit.start : unit.end], messages[:first_question], _rest(messages, unit)
    if unit.start < first_question:
        before = []
    elif own[0]["role"] != "user":
        before = [*before, {"role": "user", "content": "text"}]
    return UnitExample(conversation=replace(conversation, messages=[*before, *own, *after]), start=len(before))


def _rest(messages: Sequence[Message], unit: TurnUnit) -> list[Message]:
    """Return the fewest messages that may follow a unit."""
    question, answer = {"role": "user", "content": "text"}, {"role": "assistant", "content": "text"}
    rest = messages[unit.end :]
    if not rest:
        return []
    if all(message["role"] != "user" for message in rest):
        return [answer]
    is_answered = messages[unit.end - 1]["role"] == "assistant"
    return [question, answer] if is_answered or rest[0]["role"] == "user" else [answer, question, answer]
