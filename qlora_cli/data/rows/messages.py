"""Read the messages of a conversation, in the forms that many tools write, into the form that chat templates take.

Nothing in a message is dropped silently: it becomes a key that templates know, or decides whether the message is
trained, or the row is refused. A key that none of the lists here contains is left to the template, and recorded.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from qlora_cli.data.limits import join_names
from qlora_cli.data.rows.examples import PLAIN_KEYS, REASONING_KEYS, RowError, is_blank, json_type_of, parse_json
from qlora_cli.data.rows.tool_calls import read_calls, unknown_keys
from qlora_cli.data.rows.train_switches import TRAIN, pop_switch

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function": "tool",
}
CALLING_ROLES = {"function_call", "tool_call"}  # the content of such a message is its tool calls
SPEAKING_ROLES = {word: role for word, role in ROLES.items() if word not in CALLING_ROLES}
SHAREGPT_KEYS = {"from", "value"}
ROLE_KEYS, CONTENT_KEYS, CALL_KEYS = ("role", "from"), ("content", "value"), ("tool_calls", "function_call")
REASONING = frozenset(REASONING_KEYS)
# Keys that a chat template writes, or that carry nothing to write.
KNOWN_MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", TRAIN, *REASONING_KEYS} | {
    *("id", "message_id", "parent_id", "index", "timestamp", "created_at", "create_time", "date", "time"),
}
KNOWN_PART_KEYS = {"id", "index", "signature", "cache_control", "annotations", "citations", "logprobs", "status"}
NON_CALL_KEYS = KNOWN_PART_KEYS - {"id"}
TEXT_PARTS, REASONING_PARTS = {"text", "input_text", "output_text"}, {"reasoning", "thinking"}
CALL_PARTS = {"tool_use", "tool_call"}
TEXT_KEYS = ("text", "value", "content")
# Keys of messages and content parts that hold pictures and sounds.
MEDIA_KEY = re.compile(
    r"(input_)?(image|video|audio)s?(_?\d+)?(_(url|path|file|data|byte)s?)?|pixel_values", re.IGNORECASE
)
FILE_KEY = re.compile("(attached_)?files?|attachments?|file_ids?", re.IGNORECASE)


class MessageReader:
    """Reads messages, and collects the keys that it does not know in `unknown_keys` until the caller clears them."""

    def __init__(self) -> None:
        self.unknown_keys: set[str] = set()

    def read(self, value: object, key: str) -> list[dict[str, Any]]:
        """Return the messages in the column `key`, each with role, content and whatever else a template may use.

        A message has the key `train` only if the row says whether it is trained.

        Raises:
            RowError: `value` is not a list of messages, or a message holds something that can't be read or trained on.
        """
        if isinstance(value, str):
            value = parse_json(value, repr(key))
        if not isinstance(value, list) or not value:
            json_type = "an empty one" if value == [] else json_type_of(value)
            raise RowError(f"{key!r} must be a list of at least one message, found {json_type}")
        messages: list[dict[str, Any]] = []
        for index, raw in enumerate(value):
            plain = _read_plain(raw) if isinstance(raw, dict) else None
            if plain is not None:
                messages.append(plain)
                continue
            message = self._read_message(raw, f"{key}[{index}]")
            if messages and messages[-1]["role"] == "assistant" and _has_calling_role(raw):
                messages[-1] = _merge_turn(messages[-1], message, f"{key}[{index}]")
            else:
                messages.append(message)
        return messages

    def _read_message(self, raw: object, where: str) -> dict[str, Any]:
        if not isinstance(raw, Mapping):
            raise RowError(f"{where} must be an object with role and content, found {json_type_of(raw)}")
        # Reading into columns gives every message every key; a null stands for a key that the message did not have.
        fields = {key: value for key, value in raw.items() if value is not None}
        if (plain := _read_plain(fields)) is not None:
            return plain
        role_name, role = _pop_role(fields, where)
        train = pop_switch(fields, where)
        if media := find_media_key(fields):
            raise not_text_error(where, media)
        body = self._pop_body(fields, where, is_calling=role_name in CALLING_ROLES)
        _check_role(body, role, where)
        if TRAIN in body and train not in (None, body[TRAIN]):
            raise RowError(f"{where} and its parts disagree on whether it is trained")
        if (reasoning := _pop_reasoning(fields, where)) is not None and "reasoning_content" in body:
            raise RowError(f"{where} has reasoning both in its parts and outside of them")
        message = {**fields, **body, **(reasoning or {}), **({} if train is None else {TRAIN: train})}
        self.unknown_keys |= {key for key in message.keys() - KNOWN_MESSAGE_KEYS if not is_blank(message[key])}
        self.unknown_keys |= unknown_keys(message.get("tool_calls", []))
        return {"role": role, "content": message.pop("content"), **message}

    def _pop_body(self, fields: dict[str, Any], where: str, *, is_calling: bool) -> dict[str, Any]:
        """Remove content, calls and refusal from a message's fields, and return them under the keys of templates."""
        content_key, value = _pop_alias(fields, CONTENT_KEYS, where)
        body: dict[str, Any] = (
            {"content": ""} if content_key is None else self._read_content(value, f"{where}.{content_key}")
        )
        if is_calling and (text := body["content"].strip()):  # before the parts that are calls, which come last
            calls = read_calls(text, f"{where}.{content_key}")
            body = {**body, "content": "", "tool_calls": [*calls, *body.get("tool_calls", ())]}
        for key in CALL_KEYS:
            if key in fields and (calls := read_calls(fields.pop(key), f"{where}.{key}")):
                if _functions(body.get("tool_calls") or calls) != _functions(calls):
                    raise RowError(f"{where} has calls in {key!r} that differ from its other calls")
                body["tool_calls"] = calls
        if is_calling and not body.get("tool_calls"):
            raise RowError(f"{where} is a call by its role, but holds none")
        refusal = fields.pop("refusal") if isinstance(fields.get("refusal"), str) else ""
        if refusal and body["content"] not in ("", refusal):
            raise RowError(f"{where} has both {content_key!r} and 'refusal', which differ")
        if content_key is None and not refusal and "tool_calls" not in body:
            raise RowError(f"{where} has no content")
        return {**body, "content": body["content"] or refusal}

    def _read_content(self, value: object, where: str) -> dict[str, Any]:
        """Return a message's content: its text parts joined, and the other parts under the keys of templates."""
        if isinstance(value, str):
            return {"content": value}
        if isinstance(value, Mapping) and "type" in value:
            value = [value]
        if not isinstance(value, list):
            raise RowError(f"{where} must be text, found {json_type_of(value)}")
        parts = _Parts(where)
        for part in value:
            self.unknown_keys |= {f"content.{key}" for key in parts.add(part)}
        return parts.merge()


class _Parts:
    """Collects the parts of a message's content, which must come in the order reasoning, text, calls."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._reasoning: list[str] = []
        self._texts: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._switches: list[bool | None] = []

    def add(self, part: object) -> set[str]:
        """Add a part, and return those of its keys that are not used.

        Raises:
            RowError: the part is neither text, nor reasoning, nor a call, or comes after a part that it must precede.
        """
        where = f"{self._where}[{len(self._switches)}]"
        if isinstance(part, str):
            part = {"text": part}
        if not isinstance(part, Mapping):
            raise not_text_error(where, json_type_of(part))
        fields = {key: value for key, value in part.items() if value is not None}
        part_type = str(fields.pop("type", "text"))
        self._switches.append(pop_switch(fields, where))
        if part_type in CALL_PARTS:
            self._add_call(fields, where)
            return set()
        if part_type not in TEXT_PARTS | REASONING_PARTS | {"refusal"}:
            raise not_text_error(where, part_type)
        if media := find_media_key(fields):
            raise not_text_error(where, media)
        self._add_text(part_type, fields, where)
        return {key for key in fields.keys() - KNOWN_PART_KEYS if not is_blank(fields[key])}

    def _add_call(self, fields: dict[str, Any], where: str) -> None:
        call = (
            fields["value"]
            if "value" in fields
            else {key: value for key, value in fields.items() if key not in NON_CALL_KEYS}
        )
        calls = read_calls(call, where)
        if not calls:
            raise RowError(f"{where} must hold functions with a name")
        self._calls += calls

    def _add_text(self, part_type: str, fields: dict[str, Any], where: str) -> None:
        key, text = _pop_alias(fields, TEXT_KEYS if part_type in TEXT_PARTS else (part_type, *TEXT_KEYS), where)
        if isinstance(text, list):
            text = _join_parts(text, f"{where}.{key}")
        if not isinstance(text, str):
            raise RowError(f"{where} is a part of type {part_type}, but has no text")
        is_reasoning = part_type in REASONING_PARTS
        if self._calls or (is_reasoning and self._texts):
            raise RowError(
                f"{where} is {part_type} after {'calls' if self._calls else 'text'}: "
                "reasoning comes first, calls last",
                hint="Write it as a message of its own.",
            )
        (self._reasoning if is_reasoning else self._texts).append(text)

    def merge(self) -> dict[str, Any]:
        """Return the parts merged, under the keys of a message that templates know.

        Raises:
            RowError: some parts are trained and others are not.
        """
        body: dict[str, Any] = {"content": "".join(self._texts)}
        if self._reasoning:
            body["reasoning_content"] = "\n".join(self._reasoning)
        if self._calls:
            body["tool_calls"] = self._calls
        if False in self._switches and set(self._switches) != {False}:
            raise RowError(
                f"{self._where} has parts that are trained and others that are not: an answer is trained as a whole",
                hint="Write what is not trained as a message of its own.",
            )
        if switch := set(self._switches) - {None}:
            (body[TRAIN],) = switch
        return body


def _join_parts(parts: list[Any], where: str) -> str:
    """Return the text of parts within a part, which is how Mistral writes reasoning."""
    inner = _Parts(where)
    for part in parts:
        inner.add(part)
    return str(inner.merge()["content"])


def not_text_error(where: str, content_type: str) -> RowError:
    """Return the error for a message or part that holds a picture, a sound or anything else that is not text."""
    remedy = "write it as a message from tool" if content_type == "tool_result" else "write what it says as text"
    return RowError(
        f"{where} holds {content_type}, but only text can be trained on",
        hint=f"Leave such rows out (--on-bad-row skip), or {remedy}.",
    )


def _read_plain(message: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a message that is only a role and a text, as nearly all are; None if it is anything else."""
    if message.keys() == PLAIN_KEYS:
        role_name, text = message["role"], message["content"]
    elif message.keys() == SHAREGPT_KEYS:
        role_name, text = message["from"], message["value"]
    else:
        return None
    role = SPEAKING_ROLES.get(role_name) if type(role_name) is str else None
    return {"role": role, "content": text} if role is not None and type(text) is str else None


def _has_calling_role(message: Mapping[str, Any]) -> bool:
    """Return whether a message consists of calls, which belong to the turn of the assistant's message before it."""
    return any(str(message.get(key)).lower() in CALLING_ROLES for key in ROLE_KEYS)


def _functions(calls: list[dict[str, Any]]) -> list[Any]:
    """Return the functions called, without the ids, which the same calls may have under one key and lack elsewhere."""
    return [call["function"] for call in calls]


def _merge_turn(turn: dict[str, Any], calling: dict[str, Any], where: str) -> dict[str, Any]:
    """Return an assistant message merged with the message of calls that follows it.

    Raises:
        RowError: the two disagree on a value that a turn has once, or the calls bring reasoning after text.
    """
    if turn.get(TRAIN, True) != calling.get(TRAIN, True):
        raise RowError(f"{where} and the message before it are one turn, but disagree on whether it is trained")
    if not REASONING.isdisjoint(calling) and (
        turn["content"].strip() or not {*REASONING, "tool_calls"}.isdisjoint(turn)
    ):
        raise RowError(
            f"{where} has reasoning after the text of the message before it, and the two are one turn",
            hint="Reasoning comes first: write it into the message before it, or the calls as 'tool_calls' of a "
            "message from assistant.",
        )
    for key in (turn.keys() & calling.keys()) - KNOWN_MESSAGE_KEYS:
        if turn[key] != calling[key]:
            raise RowError(
                f"{where} and the message before it are one turn, but have different values of {key!r}",
                hint="Remove it from one of them.",
            )
    return {**calling, **turn, "tool_calls": [*turn.get("tool_calls", ()), *calling["tool_calls"]]}


def _pop_reasoning(fields: dict[str, Any], where: str) -> dict[str, str] | None:
    """Remove the reasoning from a message's fields, and return it under its key; None if there is none."""
    key, reasoning = _pop_alias(fields, REASONING_KEYS, where)
    if key is None or reasoning == "":
        return None
    if not isinstance(reasoning, str):
        raise RowError(f"{where}.{key} must be text, found {json_type_of(reasoning)}")
    return {key: reasoning}


def find_media_key(fields: Mapping[str, Any]) -> str | None:
    """Return the first key of a message or part that holds a picture, a sound or a file."""
    for key, value in fields.items():
        may_be_media = is_media_name(key) or FILE_KEY.fullmatch(key)
        if may_be_media and not isinstance(value, int | float) and not is_blank(value):
            return key
    return None


@functools.lru_cache(maxsize=4096)
def is_media_name(name: str) -> bool:
    """Return whether a column or key of this name may hold pictures or sounds."""
    return MEDIA_KEY.fullmatch(name) is not None


def _pop_role(fields: dict[str, Any], where: str) -> tuple[str, str]:
    """Remove the role from a message's fields, and return it as written, in lower case, and as templates know it."""
    written = {key: fields.pop(key) for key in ROLE_KEYS if key in fields}
    if not written:
        raise RowError(f"{where} has no role, only {join_names(list(map(repr, fields))) or 'nothing'}")
    names = [name.lower() if isinstance(name, str) else None for name in written.values()]
    for key, name in zip(written, names, strict=True):
        if name not in ROLES:
            raise RowError(f"{where}.{key} is {written[key]!r}, not one of {', '.join(ROLES)}")
    roles = {ROLES[str(name)] for name in names}
    if len(roles) > 1:
        raise RowError(f"{where} has two roles: {' and '.join(map(repr, written.values()))}")
    return next((str(name) for name in names if name in CALLING_ROLES), str(names[0])), roles.pop()


def _pop_alias(fields: dict[str, Any], keys: tuple[str, ...], where: str) -> tuple[str | None, Any]:
    """Remove all of `keys` from `fields`, and return the first that was present with its value, or two Nones.

    Raises:
        RowError: two of the keys have different values.
    """
    present = [(key, fields.pop(key)) for key in dict.fromkeys(keys) if key in fields]
    if not present:
        return None, None
    key, value = present[0]
    for other_key, other in present[1:]:
        if other != value:
            raise RowError(f"{where} has both {key!r} and {other_key!r}, which differ")
    return key, value


def _check_role(body: Mapping[str, Any], role: str, where: str) -> None:
    for key, content in (("tool_calls", "tool calls"), ("reasoning_content", "reasoning")):
        if key in body and role != "assistant":
            raise RowError(f"{where} has {content}, which only the assistant may have; its role is {role}")
