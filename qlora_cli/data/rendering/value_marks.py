"""Replace every value of a conversation by a mark, to find the values that a template leaves out.

A template silently ignores values that it does not know. A value may be in the text by chance; a mark is there only if
the template wrote the value. Conversations of the same roles and keys become the same marked conversation, which is
rendered once for all of them.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from qlora_cli.data.rows.examples import REASONING_KEYS, Conversation

# Values that templates need not write: they link a result to its call.
IDS, NAMES = frozenset({"id", "tool_call_id", "call_id"}), frozenset({"name"})
CLOSES_REASONING = re.compile(r"(?i)[<\[|]+(/|end_)\S*(think|reason|thought)")
EMPTY: tuple[tuple[type, Any], ...] = ((int, 1), (float, 1.5), (list, []), (dict, {}))
MAX_TAGS = 16  # in one content; one with more is a text about tags, and is not split
CALL_PATHS = ("tool_calls.", "tool_calls.function.")  # before the keys of calls, and of what they call
FIRST_NUMBER = 73_100_000
MAX_MARKED_TOOLS = 2  # templates render all tools alike


class ValueKind(Enum):
    """The role of a value for the model."""

    CONTENT = "content"
    TEXT_WITH_CALLS = "text next to tool calls"
    REASONING = "reasoning"
    CALL = "tool calls"
    ARGUMENTS = "arguments"
    TOOL = "tools"
    TOOL_DETAILS = "descriptions and parameters of tools"
    OTHER = "other keys"


@dataclass(frozen=True, kw_only=True)
class Value:
    """A value of the message `index`, or of the tools if that is None, with its key in the row.

    `order`: the number of values of the same kind before it in the message.
    """

    index: int | None
    kind: ValueKind
    key: str
    text: str
    order: int


@dataclass(frozen=True, kw_only=True)
class MarkedConversation:
    """A conversation whose values are replaced by marks.

    Attributes:
        marks: The marks, as values.
        values: The values of the original conversation; arguments and tools have more values than marks.
    """

    conversation: Conversation
    marks: tuple[Value, ...]
    values: tuple[Value, ...]


def mark_values(conversation: Conversation, tags: re.Pattern[str]) -> MarkedConversation:
    """Return `conversation` with its values replaced by marks; contents are split at `tags`."""
    marker = _Marker(tags)
    marked = replace(
        conversation,
        messages=[marker.message(index, message) for index, message in enumerate(conversation.messages)],
        trained=(),
        tools=marker.tools(conversation.tools) if conversation.tools else None,
    )
    return MarkedConversation(conversation=marked, marks=tuple(marker.marks), values=tuple(marker.values))


def mark_tools(conversation: Conversation, tags: re.Pattern[str]) -> list[Any] | None:
    """Return the tools of a conversation with their values replaced by marks; None if there are none."""
    return _Marker(tags).tools(conversation.tools) if conversation.tools else None


def message_shape(message: Mapping[str, Any], tags: re.Pattern[str]) -> str:
    """Return a text that is equal for messages with the same role, keys and tags."""
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
        self._index: int | None = None
        self._ids: dict[object, str] = {}
        self._names: dict[object, str] = {}

    def message(self, index: int, message: Mapping[str, Any]) -> dict[str, Any]:
        self._index = index
        marked: dict[str, Any] = {}
        for key, value in message.items():
            if key == "role":
                marked[key] = value
            elif key == "content":
                marked[key] = self._content(value, has_calls=bool(message.get("tool_calls")))
            elif key in REASONING_KEYS and isinstance(value, str):
                marked[key] = self._mark(ValueKind.REASONING, key, value) if value.strip() else ""
            elif key == "tool_calls":
                marked[key] = [self._call(call) for call in value]
            else:
                marked[key] = self._other(key, value)
        return marked

    def tools(self, tools: Sequence[Any]) -> list[Any]:
        self._index = None
        for tool in tools:
            self._tool_values(_function_of(tool))
        return [self._tool(tool) for tool in tools[:MAX_MARKED_TOOLS]]

    def _add(self, kind: ValueKind, key: str, text: str) -> None:
        self.values.append(self._value(self.values, kind, key, text))

    def _new(self, kind: ValueKind, key: str, number: int | None = None) -> str:
        text = f"Mark{len(self.marks)}Q" if number is None else str(number)
        self.marks.append(self._value(self.marks, kind, key, text))
        return text

    def _value(self, earlier: Sequence[Value], kind: ValueKind, key: str, text: str) -> Value:
        order = 0
        for value in reversed(earlier):
            if value.index != self._index:
                break
            order += value.kind == kind
        return Value(index=self._index, kind=kind, key=key, text=text, order=order)

    def _mark(self, kind: ValueKind, key: str, text: str) -> str:
        self._add(kind, key, text)
        return self._new(kind, key)

    def _content(self, content: str, *, has_calls: bool) -> str:
        kind = ValueKind.TEXT_WITH_CALLS if has_calls else ValueKind.CONTENT
        cuts = [match.span() for match in self._tags.finditer(content)]
        if len(cuts) > MAX_TAGS:
            cuts = []
        starts, ends = [0, *(end for _, end in cuts)], [*(start for start, _ in cuts), len(content)]
        pieces = []
        for start, end, (_, tag_end) in zip(starts, ends, [*cuts, (0, len(content))], strict=True):
            tag = content[end:tag_end]
            piece = content[start:end]
            value_type = ValueKind.REASONING if CLOSES_REASONING.match(tag) else kind
            pieces += [self._piece(value_type, piece), tag]
        return "".join(pieces)

    def _piece(self, kind: ValueKind, piece: str) -> str:
        """Return a mark with the spaces around a piece."""
        text = piece.strip()
        if not text:
            return piece[:2]
        start = piece.index(text)
        return piece[:start][:2] + self._mark(kind, "content", text) + piece[start + len(text) :][:2]

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        name = self._names[function["name"]] = self._mark(ValueKind.CALL, "tool_calls", function["name"])
        marked: dict[str, Any] = {
            key: self._other(key, value, CALL_PATHS[1])
            for key, value in function.items()
            if key not in ("name", "arguments")
        }
        marked |= {"name": name, "arguments": self._arguments(function.get("arguments"))}
        outer = {key: self._other(key, value, CALL_PATHS[0]) for key, value in call.items() if key != "function"}
        return {**outer, "function": marked}

    def _arguments(self, arguments: Any) -> Any:
        """Return an example with the types of `arguments`, because their names differ from row to row."""
        key = "arguments"
        for text in _leaves(arguments):
            self._add(ValueKind.ARGUMENTS, key, text)
        if not isinstance(arguments, dict):
            return (
                self._new(ValueKind.ARGUMENTS, key) if isinstance(arguments, str) and arguments.strip() else arguments
            )
        kinds = {_value_type(value) for value in arguments.values()}
        marked: dict[str, Any] = {}
        if str in kinds:
            marked[self._new(ValueKind.ARGUMENTS, key)] = self._new(ValueKind.ARGUMENTS, key)
        if float in kinds:
            name, number = self._new(ValueKind.ARGUMENTS, key), FIRST_NUMBER + len(self.marks)
            self._new(ValueKind.ARGUMENTS, key, number)
            marked[name] = number
        if dict in kinds:
            marked[self._new(ValueKind.ARGUMENTS, key)] = {
                self._new(ValueKind.ARGUMENTS, key): [self._new(ValueKind.ARGUMENTS, key)],
            }
        if bool in kinds:
            marked[self._new(ValueKind.ARGUMENTS, key)] = True
        return marked

    def _tool(self, tool: Any) -> Any:
        function = _function_of(tool)
        marked: dict[str, Any] = {}
        for key, value in function.items():
            if key == "name" and isinstance(value, str):
                marked[key] = self._new(ValueKind.TOOL, "tools")
            elif key == "description" and isinstance(value, str) and value.strip():
                marked[key] = self._new(ValueKind.TOOL_DETAILS, "tools")
            elif key == "parameters":
                marked[key] = self._parameters(value)
            elif isinstance(value, bool):
                marked[key] = value
        return {"type": "function", "function": marked} if isinstance(tool, dict) and "function" in tool else marked

    def _parameters(self, parameters: Any) -> dict[str, Any]:
        names = _properties_of(parameters)
        if not names:
            return {"type": "object", "properties": {}}
        name = self._new(ValueKind.TOOL_DETAILS, "tools")
        schema: dict[str, Any] = {"type": "string"}
        if any(isinstance(each, dict) and each.get("description") for each in names.values()):
            schema["description"] = self._new(ValueKind.TOOL_DETAILS, "tools")
        return {"type": "object", "properties": {name: schema}, "required": [name]}

    def _tool_values(self, function: Mapping[str, Any]) -> None:
        if isinstance(function.get("name"), str):
            self._add(ValueKind.TOOL, "tools", function["name"])
        properties = _properties_of(function.get("parameters"))
        schemas = [each for each in properties.values() if isinstance(each, dict)]
        for text in [*properties, *(each.get("description") for each in (function, *schemas))]:
            if isinstance(text, str):
                self._add(ValueKind.TOOL_DETAILS, "tools", text)

    def _other(self, key: str, value: Any, path: str = "") -> Any:
        """Return a fixed value for an id, a name, or a key of unknown meaning."""
        if key in IDS and isinstance(value, str):
            return self._ids.setdefault(value, self._id(value))
        if key in NAMES and isinstance(value, str):
            return self._names.get(value, "name")
        if isinstance(value, str):
            return value if key == "type" or not value.strip() else self._mark(ValueKind.OTHER, f"{path}{key}", value)
        if isinstance(value, bool) or value is None:
            return value
        return next((empty for value_type, empty in EMPTY if isinstance(value, value_type)), "other")

    def _id(self, value: str) -> str:
        """Return an id of nine characters, as Mistral requires; a function's name in it is replaced by its mark."""
        named = next((name for name in self._names if str(name) in value), None)
        return f"id{len(self._ids):07d}" if named is None else value.replace(str(named), self._names[named])


def _function_of(tool: Any) -> Mapping[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return function if isinstance(function, dict) else {}


def _properties_of(parameters: Any) -> dict[str, Any]:
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return properties if isinstance(properties, dict) else {}


def _value_type(value: Any) -> type:
    if isinstance(value, bool) or value is None:
        return bool
    if isinstance(value, int | float):
        return float
    return str if isinstance(value, str) else dict


def _leaves(value: Any) -> Iterator[str]:
    """Yield the keys, texts and numbers in a value, as in JSON."""
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
