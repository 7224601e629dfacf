"""The form in which messages are passed to a chat template, and the candidate forms for a conversation.

Templates differ in what they accept: contents as text or as lists of parts, arguments of calls as objects or as JSON
text, reasoning under one key or another or within the content, and `developer` as a role or not.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from qlora_cli.data.rendering.value_marks import arguments_of
from qlora_cli.data.rows.examples import REASONING_KEYS, Conversation

Message = dict[str, Any]
REASONING_IN_CONTENT = re.compile(r"\s*<think>\n?(.*?)</think>\s*(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class MessageForm:
    """The form in which messages are passed to a template.

    Attributes:
        roles_in_parts: The roles whose contents are lists of parts.
        arguments_as_text: Whether the arguments of calls are JSON text.
        reasoning_key: The key of reasoning, whatever it is in the row; None leaves it unchanged.
        split_reasoning: Whether text between `<think>` and `</think>` is moved from contents to `reasoning_key`.
        has_developer: Whether `developer` is a role; otherwise it becomes `system`.
    """

    roles_in_parts: frozenset[str] = frozenset()
    arguments_as_text: bool = False
    reasoning_key: str | None = None
    split_reasoning: bool = False
    has_developer: bool = True

    def apply(self, conversation: Conversation) -> Conversation:
        """Return `conversation` in this form."""
        if self == AS_WRITTEN:
            return conversation
        return replace(conversation, messages=[self.message(message) for message in conversation.messages])

    def message(self, message: Message) -> Message:
        """Return a message in this form."""
        result = dict(message)
        if (
            self.split_reasoning
            and self.reasoning_key
            and (match := REASONING_IN_CONTENT.fullmatch(result["content"]))
        ):
            result |= {"content": match[2], self.reasoning_key: match[1].strip()}
        if self.reasoning_key is not None:
            result = {self.reasoning_key if key in REASONING_KEYS else key: value for key, value in result.items()}
        if result["role"] in self.roles_in_parts:
            result["content"] = [{"type": "text", "text": result["content"]}]
        if self.arguments_as_text and result.get("tool_calls"):
            result["tool_calls"] = [_with_arguments_as_text(call) for call in result["tool_calls"]]
        if not self.has_developer and result["role"] == "developer":
            result["role"] = "system"
        return result

    def keeps_text(self, messages: Iterable[Message]) -> bool:
        """Return whether the contents of plain messages are passed on as they are."""
        return not self.roles_in_parts or self.roles_in_parts.isdisjoint(message["role"] for message in messages)

    @property
    def num_changes(self) -> int:
        """The number of changes that this form makes to rows as they are written."""
        changes = (self.roles_in_parts, self.arguments_as_text, self.reasoning_key)
        return sum(map(bool, changes)) + (not self.has_developer)


AS_WRITTEN = MessageForm()


def candidate_forms(conversation: Conversation, *, knows_developer: bool) -> list[MessageForm]:
    """Return the forms that differ for a conversation, those with the fewest changes first.

    For a template that does not name the role `developer`, forms without it come first.
    """
    messages = conversation.messages
    roles = frozenset(message["role"] for message in messages)
    has_objects = any(isinstance(arguments, dict) for message in messages for arguments in arguments_of(message))
    in_parts = (frozenset[str](), *(frozenset({role}) for role in roles), roles - {"system"}, roles - {"tool"}, roles)
    options = itertools.product(
        dict.fromkeys(in_parts),
        (False, True) if has_objects else (False,),
        _reasoning_options(messages),
        (knows_developer, not knows_developer) if "developer" in roles else (True,),
    )
    forms = [
        MessageForm(
            roles_in_parts=parts,
            arguments_as_text=as_text,
            reasoning_key=key,
            split_reasoning=splits,
            has_developer=has_developer,
        )
        for parts, as_text, (key, splits), has_developer in options
    ]
    return sorted(
        forms, key=lambda form: (form.has_developer != knows_developer and "developer" in roles, form.num_changes)
    )


def merge_forms(forms: Iterable[MessageForm]) -> MessageForm:
    """Return the form that combines the changes of several."""
    forms = list(forms)
    return MessageForm(
        roles_in_parts=frozenset[str]().union(*(form.roles_in_parts for form in forms)),
        arguments_as_text=any(form.arguments_as_text for form in forms),
        reasoning_key=next((form.reasoning_key for form in forms if form.reasoning_key), None),
        split_reasoning=any(form.split_reasoning for form in forms),
        has_developer=all(form.has_developer for form in forms),
    )


def _reasoning_options(messages: Iterable[Message]) -> Iterator[tuple[str | None, bool]]:
    """Yield the keys that reasoning may have, and whether reasoning in contents is moved there."""
    messages = list(messages)
    yield None, False
    keys = {key for message in messages for key in message if key in REASONING_KEYS}
    if keys:
        yield from ((key, False) for key in REASONING_KEYS if keys - {key})
    if any(
        message["role"] == "assistant" and REASONING_IN_CONTENT.fullmatch(message["content"]) for message in messages
    ):
        yield from ((key, True) for key in REASONING_KEYS)


def _with_arguments_as_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}}
