"""The form in which a chat template is given messages, and those that may make a difference to a conversation.

Templates differ in what they take: contents as text or as lists of parts, arguments of calls as objects or as JSON
text, reasoning under one key or another or within the content, `developer` as a role or none.
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
THOUGHT = re.compile(r"\s*<think>\n?(.*?)</think>\s*(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Form:
    """The form in which a template is given messages.

    Attributes:
        roles_in_parts: The roles whose contents are lists of parts.
        arguments_as_text: The arguments of calls are JSON text.
        reasoning_key: The key of reasoning, whatever the row calls it; None leaves it.
        thoughts_apart: What stands between `<think>` and `</think>` is taken out of contents, and goes under
            `reasoning_key`.
        has_developer: `developer` is a role; without, it is `system`.
    """

    roles_in_parts: frozenset[str] = frozenset()
    arguments_as_text: bool = False
    reasoning_key: str | None = None
    thoughts_apart: bool = False
    has_developer: bool = True

    def apply(self, conversation: Conversation) -> Conversation:
        """Return `conversation` in this form."""
        if self == AS_THEY_ARE:
            return conversation
        return replace(conversation, messages=[self.message(message) for message in conversation.messages])

    def message(self, message: Message) -> Message:
        """Return a message in this form."""
        given = dict(message)
        if self.thoughts_apart and self.reasoning_key and (found := THOUGHT.fullmatch(given["content"])):
            given |= {"content": found[2], self.reasoning_key: found[1].strip()}
        if self.reasoning_key is not None:
            given = {self.reasoning_key if key in REASONING_KEYS else key: value for key, value in given.items()}
        if given["role"] in self.roles_in_parts:
            given["content"] = [{"type": "text", "text": given["content"]}]
        if self.arguments_as_text and given.get("tool_calls"):
            given["tool_calls"] = [_with_text(call) for call in given["tool_calls"]]
        if not self.has_developer and given["role"] == "developer":
            given["role"] = "system"
        return given

    @property
    def num_changes(self) -> int:
        """In how many respects it is not as rows are written."""
        changes = (self.roles_in_parts, self.arguments_as_text, self.reasoning_key)
        return sum(map(bool, changes)) + (not self.has_developer)


AS_THEY_ARE = Form()


def forms_for(conversation: Conversation, *, knows_developer: bool) -> list[Form]:
    """Return the forms that make a difference to a conversation, those nearest to how rows are written first.

    Of a template that does not name the role `developer`, the first have none.
    """
    messages = conversation.messages
    roles = frozenset(message["role"] for message in messages)
    has_objects = any(isinstance(arguments, dict) for message in messages for arguments in arguments_of(message))
    in_parts = (frozenset[str](), *(frozenset({role}) for role in roles), roles - {"system"}, roles - {"tool"}, roles)
    respects = itertools.product(
        dict.fromkeys(in_parts),
        (False, True) if has_objects else (False,),
        _reasoning_of(messages),
        (knows_developer, not knows_developer) if "developer" in roles else (True,),
    )
    forms = [
        Form(
            roles_in_parts=parts,
            arguments_as_text=as_text,
            reasoning_key=key,
            thoughts_apart=apart,
            has_developer=has_developer,
        )
        for parts, as_text, (key, apart), has_developer in respects
    ]
    return sorted(
        forms, key=lambda form: (form.has_developer != knows_developer and "developer" in roles, form.num_changes)
    )


def common_form(forms: Iterable[Form]) -> Form:
    """Return the form that has what each of several has."""
    forms = list(forms)
    return Form(
        roles_in_parts=frozenset[str]().union(*(form.roles_in_parts for form in forms)),
        arguments_as_text=any(form.arguments_as_text for form in forms),
        reasoning_key=next((form.reasoning_key for form in forms if form.reasoning_key), None),
        thoughts_apart=any(form.thoughts_apart for form in forms),
        has_developer=all(form.has_developer for form in forms),
    )


def _reasoning_of(messages: Iterable[Message]) -> Iterator[tuple[str | None, bool]]:
    """Yield the keys that reasoning may go under, and whether that of contents goes there too."""
    messages = list(messages)
    yield None, False
    keys = {key for message in messages for key in message if key in REASONING_KEYS}
    if keys:
        yield from ((key, False) for key in REASONING_KEYS if keys - {key})
    if any(message["role"] == "assistant" and THOUGHT.fullmatch(message["content"]) for message in messages):
        yield from ((key, True) for key in REASONING_KEYS)


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}}
