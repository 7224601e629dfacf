"""Errors for values that a chat template leaves out of its text, with hints."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_cli.data.rendering.template_fit import DroppedValue
from qlora_cli.data.rendering.value_marks import Value, ValueKind
from qlora_cli.data.rows.examples import RowError

# Reported, not refused, if the model is not trained to write it.
MAY_BE_DROPPED = (ValueKind.REASONING, ValueKind.TEXT_WITH_CALLS)
MAX_SHOWN_CHARACTERS = 40  # characters of a value
OTHER_TEMPLATE = "Give a template that writes it (--chat-template FILE), or leave such rows out."


@dataclass(frozen=True, kw_only=True)
class ReasoningFixes:
    """Remedies for reasoning that the template drops.

    Attributes:
        switch: The column by which rows can have the template write it.
        writes_tags: Whether the template writes text between `<think>` and `</think>` in contents.
    """

    switch: str | None
    writes_tags: bool


def matching_value(value: Value, values: Iterable[Value]) -> Value | None:
    """Return the value of a row that the mark `value` stands for; None if the row has only spaces there.

    Metadata of arguments and tools are examples, which do not correspond to a single value.
    """
    same = [each for each in values if (each.index, each.kind) == (value.index, value.kind)]
    return next((each for each in same if each.order == value.order), same[0] if same else None)


def dropped_value_error(
    dropped: DroppedValue,
    value: Value,
    messages: Sequence[Mapping[str, Any]],
    find_fixes: Callable[[], ReasoningFixes],
) -> RowError:
    """Return the error for a row whose `value` the template drops."""
    text = repr(value.text if len(value.text) <= MAX_SHOWN_CHARACTERS else f"{value.text[:MAX_SHOWN_CHARACTERS]}…")
    index, kind = value.index, value.kind
    if dropped.as_answer:
        return RowError(
            f"the chat template writes message {index} ({messages[index or 0]['role']}) as an answer of the assistant",
            hint="Give a template that knows its role (--chat-template FILE, or chatml), or leave such rows out.",
        )
    if kind == ValueKind.REASONING:
        return _dropped_reasoning_error(dropped, value, text, find_fixes())
    if kind == ValueKind.TEXT_WITH_CALLS:
        return RowError(
            f"the chat template leaves out the text next to the tool calls of message {index}: {text} is not in it",
            hint="Give a template that writes both (--chat-template FILE), or train without it (--accept-lost).",
        )
    if kind in (ValueKind.CALL, ValueKind.TOOL):
        where = "in the text" if index is None else "in the answer"
        return RowError(f"the chat template does not write {kind.value}: {text} is not {where}", hint=OTHER_TEMPLATE)
    if kind == ValueKind.ARGUMENTS:
        named = "" if dropped.is_always else f": {text} is not in the answer"
        return RowError(
            f"the chat template leaves out arguments of the tool calls of message {index}{named}", hint=OTHER_TEMPLATE
        )
    assert index is not None, "tools have no content"
    return RowError(
        f"the chat template leaves out message {index} ({messages[index]['role']}): {text} is not in the text",
        hint="Give a template that writes it (--chat-template FILE, or chatml), or leave such rows out.",
    )


def _dropped_reasoning_error(dropped: DroppedValue, value: Value, text: str, fixes: ReasoningFixes) -> RowError:
    in_content = value.key == "content"
    steps = [
        f"have the template write it, by a column {fixes.switch}" if fixes.switch else "",
        "write it into the content as the model answers (<think>…</think>)"
        if fixes.writes_tags and not in_content
        else "",
        "use --chat-template chatml, which writes contents as they are, or a template that keeps reasoning"
        if in_content
        else "give a template that writes it (--chat-template FILE)",
        "train without it (--accept-lost)" if dropped.is_served else "",
    ]
    hint = "; or ".join(filter(None, steps))
    hint = f"{hint[0].upper()}{hint[1:]}."
    if not in_content:
        return RowError(
            f"the chat template does not write reasoning: {value.key!r} of message {value.index}, {text}, is not in "
            "the text",
            hint=hint,
        )
    subject = "every answer" if dropped.is_always else f"message {value.index}"
    return RowError(
        f"the chat template removes reasoning from {subject}, which can't be trained with it: {text} is not in the "
        "text",
        hint=hint,
    )


def no_turn_end_error(index: int, message: Mapping[str, Any]) -> RowError:
    """Return the error for an answer after which the template writes no end of turn."""
    content = message["content"].rstrip()[-30:]
    after = f"the tool calls of message {index}" if message.get("tool_calls") else f"the answer {content!r}"
    return RowError(
        f"the chat template ends no turn: after {after} it writes nothing that the model could learn to stop with",
        hint="Give a template that ends each turn (--chat-template FILE)."
        if message.get("tool_calls")
        else "Give a template that ends each turn, such as --chat-template chatml.",
    )
