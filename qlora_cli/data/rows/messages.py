"""Read the messages of a conversation, as many tools write them, into what chat templates take.

Nothing that a message says is passed over: it becomes a key that templates know, or says whether the message is
trained, or the row is refused. A key that no list here knows stays for the template, and is noted down.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from qlora_cli.data.limits import join_names
from qlora_cli.data.rows.examples import PLAIN_KEYS, REASONING_KEYS, RowError, is_blank, json_type_of, read_json
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
CALLING_ROLES = {"function_call", "tool_call"}  # the text of such a message is its calls
SPEAKING = {word: role for word, role in ROLES.items() if word not in CALLING_ROLES}
SHAREGPT_KEYS = {"from", "value"}
ROLE_KEYS, CONTENT_KEYS, CALL_KEYS = ("role", "from"), ("content", "value"), ("tool_calls", "function_call")
REASONING = frozenset(REASONING_KEYS)
# What needs no place in a text.
KNOWN_MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", TRAIN, *REASONING_KEYS} | {
    *("id", "message_id", "parent_id", "index", "timestamp", "created_at", "create_time", "date", "time"),
}
KNOWN_PART_KEYS = {"id", "index", "signature", "cache_control", "annotations", "citations", "logprobs", "status"}
NON_CALL_KEYS = KNOWN_PART_KEYS - {"id"}
TEXT_PARTS, REASONING_PARTS = {"text", "input_text", "output_text"}, {"reasoning", "thinking"}
CALL_PARTS = {"tool_use", "tool_call"}
TEXT_KEYS = ("text", "value", "content")
# What holds pictures and sounds, as messages and parts of them call it.
MEDIA = re.compile(
    r"(input_)?(image|video|audio)s?(_?\d+)?(_(url|path|file|data|byte)s?)?|pixel_values", re.IGNORECASE
)
FILE_KEY = re.compile("(attached_)?files?|attachments?|file_ids?", re.IGNORECASE)


class MessageReader:
    """Reads messages. `unknown_keys` are those that it has met since they were last taken out."""

    def __init__(self) -> None:
        self.unknown_keys: set[str] = set()

    def read(self, value: object, key: str) -> list[dict[str, Any]]:
        """Return the messages in the column `key`: role and content, and what else a template may ask for.

        `train` of a message says whether it is trained, if the row does.

        Raises:
            RowError: `value` is no list of messages, or a message has something that can be neither read nor trained.
        """
        if isinstance(value, str):
            value = read_json(value, repr(key))
        if not isinstance(value, list) or not value:
            found = "an empty one" if value == [] else json_type_of(value)
            raise RowError(f"{key!r} must be a list of at least one message, found {found}")
        messages: list[dict[str, Any]] = []
        for place, message in enumerate(value):
            plain = _plain(message) if isinstance(message, dict) else None
            if plain is not None:
                messages.append(plain)
                continue
            read = self._message(message, f"{key}[{place}]")
            if messages and messages[-1]["role"] == "assistant" and _is_calling(message):
                messages[-1] = _merge_turn(messages[-1], read, f"{key}[{place}]")
            else:
                messages.append(read)
        return messages

    def _message(self, message: object, where: str) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise RowError(f"{where} must be an object with role and content, found {json_type_of(message)}")
        # Reading into columns gives every message every key; a null is a key that was not there.
        found = {name: part for name, part in message.items() if part is not None}
        if (plain := _plain(found)) is not None:
            return plain
        given, role = _pop_role(found, where)
        train = pop_switch(found, where)
        if media := find_media_key(found):
            raise not_text_error(where, media)
        read = self._read_body(found, where, is_calling=given in CALLING_ROLES)
        _check_role(read, role, where)
        if TRAIN in read and train not in (None, read[TRAIN]):
            raise RowError(f"{where} and its parts do not agree on whether it is trained")
        if (thought := _pop_reasoning(found, where)) is not None and "reasoning_content" in read:
            raise RowError(f"{where} has thoughts in its parts, and others besides")
        said = {**found, **read, **(thought or {}), **({} if train is None else {TRAIN: train})}
        self.unknown_keys |= {key for key in said.keys() - KNOWN_MESSAGE_KEYS if not is_blank(said[key])}
        self.unknown_keys |= unknown_keys(said.get("tool_calls", []))
        return {"role": role, "content": said.pop("content"), **said}

    def _read_body(self, found: dict[str, Any], where: str, *, is_calling: bool) -> dict[str, Any]:
        """Take out of a message what it says, and return it by the keys that templates know."""
        content_key, value = _pop_alias(found, CONTENT_KEYS, where)
        read: dict[str, Any] = (
            {"content": ""} if content_key is None else self._content(value, f"{where}.{content_key}")
        )
        if is_calling and (text := read["content"].strip()):  # before its parts that are calls, which come last
            calls = read_calls(text, f"{where}.{content_key}")
            read = {**read, "content": "", "tool_calls": [*calls, *read.get("tool_calls", ())]}
        for key in CALL_KEYS:
            if key in found and (calls := read_calls(found.pop(key), f"{where}.{key}")):
                if _functions(read.get("tool_calls") or calls) != _functions(calls):
                    raise RowError(f"{where} has calls in {key!r}, and others besides")
                read["tool_calls"] = calls
        if is_calling and not read.get("tool_calls"):
            raise RowError(f"{where} is to be a call by its role, and has none")
        refusal = found.pop("refusal") if isinstance(found.get("refusal"), str) else ""
        if refusal and read["content"] not in ("", refusal):
            raise RowError(f"{where} has both {content_key!r} and 'refusal', which differ")
        if content_key is None and not refusal and "tool_calls" not in read:
            raise RowError(f"{where} has no content")
        return {**read, "content": read["content"] or refusal}

    def _content(self, value: object, where: str) -> dict[str, Any]:
        """Return a message's text; parts of text, as OpenAI writes them too, are joined, others go to their keys."""
        if isinstance(value, str):
            return {"content": value}
        if isinstance(value, Mapping) and "type" in value:
            value = [value]
        if not isinstance(value, list):
            raise RowError(f"{where} must be text, found {json_type_of(value)}")
        parts = _Parts(where)
        for part in value:
            self.unknown_keys |= {f"content.{key}" for key in parts.add(part)}
        return parts.merged()


class _Parts:
    """The parts of a message's content, as they are added one by one. Thoughts come first, then text, then calls."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._thoughts: list[str] = []
        self._texts: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._switches: list[bool | None] = []

    def add(self, part: object) -> set[str]:
        """Add a part, and return the keys of it that are not used.

        Raises:
            RowError: it is neither text, nor a thought, nor a call, or stands after what would come before it.
        """
        where = f"{self._where}[{len(self._switches)}]"
        if isinstance(part, str):
            part = {"text": part}
        if not isinstance(part, Mapping):
            raise not_text_error(where, json_type_of(part))
        found = {name: value for name, value in part.items() if value is not None}
        kind = str(found.pop("type", "text"))
        self._switches.append(pop_switch(found, where))
        if kind in CALL_PARTS:
            self._add_call(found, where)
            return set()
        if kind not in TEXT_PARTS | REASONING_PARTS | {"refusal"}:
            raise not_text_error(where, kind)
        if media := find_media_key(found):
            raise not_text_error(where, media)
        self._add_text(kind, found, where)
        return {key for key in found.keys() - KNOWN_PART_KEYS if not is_blank(found[key])}

    def _add_call(self, found: dict[str, Any], where: str) -> None:
        call = (
            found["value"]
            if "value" in found
            else {key: part for key, part in found.items() if key not in NON_CALL_KEYS}
        )
        calls = read_calls(call, where)
        if not calls:
            raise RowError(f"{where} must hold functions with a name")
        self._calls += calls

    def _add_text(self, kind: str, found: dict[str, Any], where: str) -> None:
        key, text = _pop_alias(found, TEXT_KEYS if kind in TEXT_PARTS else (kind, *TEXT_KEYS), where)
        if isinstance(text, list):
            text = _join_parts(text, f"{where}.{key}")
        if not isinstance(text, str):
            raise RowError(f"{where} is a part of kind {kind}, but has no text")
        is_thought = kind in REASONING_PARTS
        if self._calls or (is_thought and self._texts):
            raise RowError(
                f"{where} is {kind} after {'calls' if self._calls else 'text'}: thoughts come first, calls last",
                hint="Write it as a message of its own.",
            )
        (self._thoughts if is_thought else self._texts).append(text)

    def merged(self) -> dict[str, Any]:
        """Return what the parts say, by the keys of a message that templates know.

        Raises:
            RowError: some are trained and some are not.
        """
        said: dict[str, Any] = {"content": "".join(self._texts)}
        if self._thoughts:
            said["reasoning_content"] = "\n".join(self._thoughts)
        if self._calls:
            said["tool_calls"] = self._calls
        if False in self._switches and set(self._switches) != {False}:
            raise RowError(
                f"{self._where} has parts that are trained and others that are not: an answer is trained as a whole",
                hint="Write what is not trained as a message of its own.",
            )
        if switch := set(self._switches) - {None}:
            (said[TRAIN],) = switch
        return said


def _join_parts(parts: list[Any], where: str) -> str:
    """Return the text of parts inside a part, as Mistral writes thoughts."""
    inside = _Parts(where)
    for part in parts:
        inside.add(part)
    return str(inside.merged()["content"])


def not_text_error(where: str, kind: str) -> RowError:
    """Return what is wrong with a row that holds pictures, sounds or anything else that is no text."""
    way = "write it as a message from tool" if kind == "tool_result" else "write what it says as text"
    return RowError(
        f"{where} holds {kind}, and only text can be trained",
        hint=f"Leave such rows out (--on-bad-row skip), or {way}.",
    )


def _plain(message: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a message that is a role and a text, as nearly all are; None if it is more."""
    if message.keys() == PLAIN_KEYS:
        word, text = message["role"], message["content"]
    elif message.keys() == SHAREGPT_KEYS:
        word, text = message["from"], message["value"]
    else:
        return None
    role = SPEAKING.get(word) if type(word) is str else None
    return {"role": role, "content": text} if role is not None and type(text) is str else None


def _is_calling(message: Mapping[str, Any]) -> bool:
    """Whether a message is calls alone, so that one after the assistant's, or after others, belongs to its turn."""
    return any(str(message.get(key)).lower() in CALLING_ROLES for key in ROLE_KEYS)


def _functions(calls: list[dict[str, Any]]) -> list[Any]:
    """Return what is called, without ids, which calls have in one place and not in another."""
    return [call["function"] for call in calls]


def _merge_turn(turn: dict[str, Any], calling: dict[str, Any], where: str) -> dict[str, Any]:
    """Return an answer with calls that follow it, and with all else that these say.

    Raises:
        RowError: the two differ in what a turn has once, or the calls come with thoughts after text.
    """
    if turn.get(TRAIN, True) != calling.get(TRAIN, True):
        raise RowError(f"{where} and the message before it are one turn, and do not agree on whether it is trained")
    if not REASONING.isdisjoint(calling) and (
        turn["content"].strip() or not {*REASONING, "tool_calls"}.isdisjoint(turn)
    ):
        raise RowError(
            f"{where} has thoughts after what the message before it says, and the two are one turn",
            hint="Thoughts come first: write them into the message before it, or the calls as 'tool_calls' of a "
            "message from assistant.",
        )
    for key in (turn.keys() & calling.keys()) - KNOWN_MESSAGE_KEYS:
        if turn[key] != calling[key]:
            raise RowError(
                f"{where} and the message before it are one turn, and have {key!r} with values that differ",
                hint="Take it out of one of them.",
            )
    return {**calling, **turn, "tool_calls": [*turn.get("tool_calls", ()), *calling["tool_calls"]]}


def _pop_reasoning(found: dict[str, Any], where: str) -> dict[str, str] | None:
    """Take out of a message what was thought before it, and return it by its key; None if nothing was."""
    key, thought = _pop_alias(found, REASONING_KEYS, where)
    if key is None or thought == "":
        return None
    if not isinstance(thought, str):
        raise RowError(f"{where}.{key} must be text, found {json_type_of(thought)}")
    return {key: thought}


def find_media_key(found: Mapping[str, Any]) -> str | None:
    """Return the first of the keys in `found` that holds a picture, a sound or a file."""
    for key, value in found.items():
        if (is_media(key) or FILE_KEY.fullmatch(key)) and not isinstance(value, int | float) and not is_blank(value):
            return key
    return None


@functools.lru_cache(maxsize=4096)
def is_media(name: str) -> bool:
    """Whether a column or key of this name may hold pictures or sounds."""
    return MEDIA.fullmatch(name) is not None


def _pop_role(found: dict[str, Any], where: str) -> tuple[str, str]:
    """Take out of a message who says it, and return the word that is written and the role that is meant."""
    there = {key: found.pop(key) for key in ROLE_KEYS if key in found}
    if not there:
        raise RowError(f"{where} has no role, but {join_names(list(map(repr, found))) or 'nothing'}")
    words = [given.lower() if isinstance(given, str) else None for given in there.values()]
    for key, word in zip(there, words, strict=True):
        if word not in ROLES:
            raise RowError(f"{where}.{key} is {there[key]!r}, not one of {', '.join(ROLES)}")
    roles = {ROLES[str(word)] for word in words}
    if len(roles) > 1:
        raise RowError(f"{where} has two roles: {' and '.join(map(repr, there.values()))}")
    return next((str(word) for word in words if word in CALLING_ROLES), str(words[0])), roles.pop()


def _pop_alias(found: dict[str, Any], keys: tuple[str, ...], where: str) -> tuple[str | None, Any]:
    """Take the value out of `found` that has one of the `keys`, and return both; all that are there must be alike."""
    there = [(key, found.pop(key)) for key in dict.fromkeys(keys) if key in found]
    if not there:
        return None, None
    key, value = there[0]
    for other_key, other in there[1:]:
        if other != value:
            raise RowError(f"{where} has both {key!r} and {other_key!r}, which differ")
    return key, value


def _check_role(said: Mapping[str, Any], role: str, where: str) -> None:
    for key, what in (("tool_calls", "calls tools"), ("reasoning_content", "thinks")):
        if key in said and role != "assistant":
            raise RowError(f"{where} {what}, which only the assistant does; its role is {role}")
