"""What is said of values that a chat template leaves out of its text, and what to do."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_cli.data.rendering.template_fit import Loss
from qlora_cli.data.rendering.value_marks import Value, What
from qlora_cli.data.rows.examples import RowError

# What is told, not refused, where the model isn't trained to write it.
MAY_BE_LOST = (What.REASONING, What.BESIDE_CALLS)
SHOWN = 40  # characters of a value
OTHER_TEMPLATE = "Give a template that writes it (--chat-template FILE), or leave such rows out."


@dataclass(frozen=True, kw_only=True)
class WaysOut:
    """What helps where reasoning is lost.

    Attributes:
        switch: The column with which rows tell the template to write it.
        writes_thoughts: The template writes what contents have between `<think>` and `</think>`.
    """

    switch: str | None
    writes_thoughts: bool


def like(value: Value, values: Iterable[Value]) -> Value | None:
    """Return the value of a row that stands where the mark `value` does; None if there it has only spaces.

    Arguments and tools are marked by examples of them, which stand for none by itself.
    """
    same = [each for each in values if (each.place, each.what) == (value.place, value.what)]
    return next((each for each in same if each.order == value.order), same[0] if same else None)


def refusal(
    loss: Loss, value: Value, messages: Sequence[Mapping[str, Any]], ways_out: Callable[[], WaysOut]
) -> RowError:
    """Return the error for a row of which `value` is lost."""
    text = repr(value.text if len(value.text) <= SHOWN else f"{value.text[:SHOWN]}…")
    place, what = value.place, value.what
    if loss.as_answer:
        return RowError(
            f"the chat template writes message {place} ({messages[place or 0]['role']}) as an answer of the assistant",
            hint="Give a template that knows its role (--chat-template FILE, or chatml), or leave such rows out.",
        )
    if what == What.REASONING:
        return _reasoning(loss, value, text, ways_out())
    if what == What.BESIDE_CALLS:
        return RowError(
            f"the chat template leaves out the text beside the tool calls of message {place}: {text} is not in it",
            hint="Give a template that writes both (--chat-template FILE), or train without it (--accept-lost).",
        )
    if what in (What.CALL, What.TOOL):
        where = "in the text" if place is None else "in the answer"
        return RowError(f"the chat template has no place for {what.value}: {text} is not {where}", hint=OTHER_TEMPLATE)
    if what == What.ARGUMENTS:
        named = "" if loss.is_of_all else f": {text} is not in the answer"
        return RowError(
            f"the chat template leaves out arguments of the tool calls of message {place}{named}", hint=OTHER_TEMPLATE
        )
    assert place is not None, "tools have no content"
    return RowError(
        f"the chat template leaves out message {place} ({messages[place]['role']}): {text} is not in the text",
        hint="Give a template that writes it (--chat-template FILE, or chatml), or leave such rows out.",
    )


def _reasoning(loss: Loss, value: Value, text: str, ways: WaysOut) -> RowError:
    in_content = value.key == "content"
    steps = [
        f"tell the template to write it, in a column {ways.switch}" if ways.switch else "",
        "write it into the content as the model answers (<think>…</think>)"
        if ways.writes_thoughts and not in_content
        else "",
        "use --chat-template chatml, which writes contents as they are, or a template that keeps reasoning"
        if in_content
        else "give a template that has a place for it (--chat-template FILE)",
        "train without it (--accept-lost)" if loss.is_served else "",
    ]
    hint = "; or ".join(filter(None, steps))
    hint = f"{hint[0].upper()}{hint[1:]}."
    if not in_content:
        return RowError(
            f"the chat template has no place for reasoning: {value.key!r} of message {value.place}, {text}, is not in "
            "the text",
            hint=hint,
        )
    kind = "every answer" if loss.is_of_all else f"message {value.place}"
    return RowError(
        f"the chat template takes reasoning out of {kind}, which can't be trained with it: {text} is not in the text",
        hint=hint,
    )


def ends_no_turn(place: int, message: Mapping[str, Any]) -> RowError:
    """Return the error for an answer behind which nothing ends the turn."""
    content = message["content"].rstrip()[-30:]
    behind = f"the tool calls of message {place}" if message.get("tool_calls") else f"the answer {content!r}"
    return RowError(
        f"the chat template ends no turn: behind {behind} it writes nothing that the model could learn to stop with",
        hint="Give a template that ends each turn (--chat-template FILE)."
        if message.get("tool_calls")
        else "Give a template that ends each turn, such as --chat-template chatml.",
    )
