"""Replace every value of a conversation by a mark, so that what a template leaves out of its text can be found.

A template that has no place for something writes the rest, and says nothing. A value itself may stand in the text by
chance; a mark stands there only if the template wrote the value. Two conversations with the same roles and keys become
the same marked conversation, so that it is rendered once for all of them.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from qlora_cli.data.rows.examples import REASONING_KEYS, Conversation

# What no template has to write: it says which call a result belongs to.
IDS, NAMES = frozenset({"id", "tool_call_id", "call_id"}), frozenset({"name"})
CLOSES_REASONING = re.compile(r"(?i)[<\[|]+(/|end_)\S*(think|reason|thought)")
EMPTY: tuple[tuple[type, Any], ...] = ((int, 1), (float, 1.5), (list, []), (dict, {}))
MOST_TAGS = 16  # in one content; one with more is about tags, and is not taken apart
CALL_PATHS = ("tool_calls.", "tool_calls.function.")  # before the keys of calls, and of what they call
FIRST_NUMBER = 73_100_000
MOST_TOOLS = 2  # that are marked; templates write all alike


class What(Enum):
    """What a value is to the model."""

    CONTENT = "content"
    BESIDE_CALLS = "text beside tool calls"
    REASONING = "reasoning"
    CALL = "tool calls"
    ARGUMENTS = "arguments"
    TOOL = "tools"
    TOOL_DETAILS = "descriptions and parameters of tools"
    OTHER = "other keys"


@dataclass(frozen=True, kw_only=True)
class Value:
    """A value of the message `place`, or of the tools, by the key that the row has it under.

    `order`: how many of its kind the same message has before it.
    """

    place: int | None
    what: What
    key: str
    text: str
    order: int


@dataclass(frozen=True, kw_only=True)
class Marked:
    """A conversation with marks for values.

    Attributes:
        marks: The marks, as values.
        values: The values of the conversation itself; arguments and tools have more of them than marks.
    """

    conversation: Conversation
    marks: tuple[Value, ...]
    values: tuple[Value, ...]


def mark(conversation: Conversation, tags: re.Pattern[str]) -> Marked:
    """Return `conversation` with marks; a content is taken apart where one of the `tags` stands in it."""
    marker = _Marker(tags)
    marked = replace(
        conversation,
        messages=[marker.message(place, message) for place, message in enumerate(conversation.messages)],
        trained=(),
        tools=marker.tools(conversation.tools) if conversation.tools else None,
    )
    return Marked(conversation=marked, marks=tuple(marker.marks), values=tuple(marker.values))


def mark_tools(conversation: Conversation, tags: re.Pattern[str]) -> list[Any] | None:
    """Return the tools of a conversation with marks."""
    return _Marker(tags).tools(conversation.tools) if conversation.tools else None


def kind_of(message: Mapping[str, Any], tags: re.Pattern[str]) -> str:
    """Return what is equal for messages with the same role and keys."""
    return repr(_Marker(tags).message(0, message))


def without_key(conversation: Conversation, key: str) -> Conversation:
    """Return a conversation without a key of its messages, their calls (`tool_calls.KEY`) or the called functions."""
    *path, name = key.split(".") if key.startswith(CALL_PATHS) else (key,)
    messages = [_without(message, path, name) for message in conversation.messages]
    return replace(conversation, messages=messages)


def _without(value: dict[str, Any], path: Sequence[str], name: str) -> dict[str, Any]:
    if not path:
        return {key: part for key, part in value.items() if key != name}
    inner = value.get(path[0])
    if isinstance(inner, list):
        return {**value, path[0]: [_without(part, path[1:], name) for part in inner]}
    return {**value, path[0]: _without(inner, path[1:], name)} if isinstance(inner, dict) else value


def arguments_of(message: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the arguments of the calls of a message."""
    for call in message.get("tool_calls") or ():
        yield call["function"].get("arguments")


class _Marker:
    def __init__(self, tags: re.Pattern[str]) -> None:
        self.marks: list[Value] = []
        self.values: list[Value] = []
        self._tags = tags
        self._place: int | None = None
        self._ids: dict[object, str] = {}
        self._names: dict[object, str] = {}

    def message(self, place: int, message: Mapping[str, Any]) -> dict[str, Any]:
        self._place = place
        found: dict[str, Any] = {}
        for key, value in message.items():
            if key == "role":
                found[key] = value
            elif key == "content":
                found[key] = self._content(value, has_calls=bool(message.get("tool_calls")))
            elif key in REASONING_KEYS and isinstance(value, str):
                found[key] = self._mark(What.REASONING, key, value) if value.strip() else ""
            elif key == "tool_calls":
                found[key] = [self._call(call) for call in value]
            else:
                found[key] = self._other(key, value)
        return found

    def tools(self, tools: Sequence[Any]) -> list[Any]:
        self._place = None
        for tool in tools:
            self._tool_values(_function_of(tool))
        return [self._tool(tool) for tool in tools[:MOST_TOOLS]]

    def _add(self, what: What, key: str, text: str) -> None:
        self.values.append(self._value(self.values, what, key, text))

    def _new(self, what: What, key: str, number: int | None = None) -> str:
        text = f"Mark{len(self.marks)}Q" if number is None else str(number)
        self.marks.append(self._value(self.marks, what, key, text))
        return text

    def _value(self, others: Sequence[Value], what: What, key: str, text: str) -> Value:
        order = 0
        for other in reversed(others):
            if other.place != self._place:
                break
            order += other.what == what
        return Value(place=self._place, what=what, key=key, text=text, order=order)

    def _mark(self, what: What, key: str, text: str) -> str:
        self._add(what, key, text)
        return self._new(what, key)

    def _content(self, content: str, *, has_calls: bool) -> str:
        what = What.BESIDE_CALLS if has_calls else What.CONTENT
        cuts = [match.span() for match in self._tags.finditer(content)]
        if len(cuts) > MOST_TAGS:
            cuts = []
        starts, ends = [0, *(end for _, end in cuts)], [*(start for start, _ in cuts), len(content)]
        pieces = []
        for start, end, (_, behind) in zip(starts, ends, [*cuts, (0, len(content))], strict=True):
            tag = content[end:behind]
            piece = content[start:end]
            kind = What.REASONING if CLOSES_REASONING.match(tag) else what
            pieces += [self._piece(kind, piece), tag]
        return "".join(pieces)

    def _piece(self, what: What, piece: str) -> str:
        """Return a mark between the spaces that stand around a piece."""
        text = piece.strip()
        if not text:
            return piece[:2]
        begin = piece.index(text)
        return piece[:begin][:2] + self._mark(what, "content", text) + piece[begin + len(text) :][:2]

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        name = self._names[function["name"]] = self._mark(What.CALL, "tool_calls", function["name"])
        marked: dict[str, Any] = {
            key: self._other(key, value, CALL_PATHS[1])
            for key, value in function.items()
            if key not in ("name", "arguments")
        }
        marked |= {"name": name, "arguments": self._arguments(function.get("arguments"))}
        others = {key: self._other(key, value, CALL_PATHS[0]) for key, value in call.items() if key != "function"}
        return {**others, "function": marked}

    def _arguments(self, arguments: Any) -> Any:
        """Return an example of what `arguments` are made of: their names differ from row to row."""
        key = "arguments"
        for text in _leaves(arguments):
            self._add(What.ARGUMENTS, key, text)
        if not isinstance(arguments, dict):
            return self._new(What.ARGUMENTS, key) if isinstance(arguments, str) and arguments.strip() else arguments
        kinds = {_kind(value) for value in arguments.values()}
        marked: dict[str, Any] = {}
        if str in kinds:
            marked[self._new(What.ARGUMENTS, key)] = self._new(What.ARGUMENTS, key)
        if float in kinds:
            name, number = self._new(What.ARGUMENTS, key), FIRST_NUMBER + len(self.marks)
            self._new(What.ARGUMENTS, key, number)
            marked[name] = number
        if dict in kinds:
            marked[self._new(What.ARGUMENTS, key)] = {
                self._new(What.ARGUMENTS, key): [self._new(What.ARGUMENTS, key)],
            }
        if bool in kinds:
            marked[self._new(What.ARGUMENTS, key)] = True
        return marked

    def _tool(self, tool: Any) -> Any:
        function = _function_of(tool)
        marked: dict[str, Any] = {}
        for key, value in function.items():
            if key == "name" and isinstance(value, str):
                marked[key] = self._new(What.TOOL, "tools")
            elif key == "description" and isinstance(value, str) and value.strip():
                marked[key] = self._new(What.TOOL_DETAILS, "tools")
            elif key == "parameters":
                marked[key] = self._parameters(value)
            elif isinstance(value, bool):
                marked[key] = value
        return {"type": "function", "function": marked} if isinstance(tool, dict) and "function" in tool else marked

    def _parameters(self, parameters: Any) -> dict[str, Any]:
        names = _properties_of(parameters)
        if not names:
            return {"type": "object", "properties": {}}
        name = self._new(What.TOOL_DETAILS, "tools")
        schema: dict[str, Any] = {"type": "string"}
        if any(isinstance(each, dict) and each.get("description") for each in names.values()):
            schema["description"] = self._new(What.TOOL_DETAILS, "tools")
        return {"type": "object", "properties": {name: schema}, "required": [name]}

    def _tool_values(self, function: Mapping[str, Any]) -> None:
        if isinstance(function.get("name"), str):
            self._add(What.TOOL, "tools", function["name"])
        properties = _properties_of(function.get("parameters"))
        schemas = [each for each in properties.values() if isinstance(each, dict)]
        for text in [*properties, *(each.get("description") for each in (function, *schemas))]:
            if isinstance(text, str):
                self._add(What.TOOL_DETAILS, "tools", text)

    def _other(self, key: str, value: Any, path: str = "") -> Any:
        """Return a value that is the same for all rows: of what tells messages apart, or is of no known meaning."""
        if key in IDS and isinstance(value, str):
            return self._ids.setdefault(value, self._id(value))
        if key in NAMES and isinstance(value, str):
            return self._names.get(value, "name")
        if isinstance(value, str):
            return value if key == "type" or not value.strip() else self._mark(What.OTHER, f"{path}{key}", value)
        if isinstance(value, bool) or value is None:
            return value
        return next((empty for kind, empty in EMPTY if isinstance(value, kind)), "other")

    def _id(self, value: str) -> str:
        """Return an id of nine characters, as Mistral's must be; of one with the name of its function, with that."""
        named = next((name for name in self._names if str(name) in value), None)
        return f"id{len(self._ids):07d}" if named is None else value.replace(str(named), self._names[named])


def _function_of(tool: Any) -> Mapping[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return function if isinstance(function, dict) else {}


def _properties_of(parameters: Any) -> dict[str, Any]:
    found = parameters.get("properties") if isinstance(parameters, dict) else None
    return found if isinstance(found, dict) else {}


def _kind(value: Any) -> type:
    if isinstance(value, bool) or value is None:
        return bool
    if isinstance(value, int | float):
        return float
    return str if isinstance(value, str) else dict


def _leaves(value: Any) -> Iterator[str]:
    """Yield the texts and numbers in a value as JSON has them, and the names of its parts."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield name
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)
