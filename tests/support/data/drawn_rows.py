"""Random rows with every key that rows may have, drawn from a seed; each of their values is unique."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from qlora_cli.data.rows.examples import Conversation

REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass
class Drawn:
    """A row with its values: those of each message, by its index, and those of its tools."""

    conversation: Conversation
    values: dict[int, list[str]]
    reasoning: dict[int, list[str]] = field(default_factory=dict)
    texts_with_calls: dict[int, list[str]] = field(default_factory=dict)
    tools: list[str] = field(default_factory=list)
    tool_details: list[str] = field(default_factory=list)


class _Words:
    def __init__(self, chance: Random) -> None:
        self._chance = chance
        self._numbers = iter(range(10_000))

    def text(self) -> str:
        """Return words of which the first is unique; sometimes on two lines, with quotes or beyond ASCII."""
        words = self._chance.choice(("of iron", 'as "said"', "größer\nund weiter", "日本", "a\tb", "x < y & z", ""))
        return f"value{next(self._numbers)}q {words}".strip()

    def name(self) -> str:
        return f"name{next(self._numbers)}q"

    def number(self) -> int:
        return 50_000 + next(self._numbers)


def draw_row(seed: int) -> Drawn:
    """Return a random row, determined by `seed`."""
    chance = Random(seed)  # noqa: S311 - not a secret
    words = _Words(chance)
    drawn = Drawn(conversation=Conversation(messages=[], trained=()), values={})
    messages = drawn.conversation.messages

    def add(role: str, content: str, **keys: Any) -> None:
        drawn.values[len(messages)] = [content] if content else []
        messages.append({"role": role, "content": content, **keys})

    tools = _draw_tools(chance, words, drawn) if chance.random() < 0.4 else None
    for role in chance.choice(((), (), ("system",), ("developer",), ("system", "developer"))):
        add(role, words.text())
    key = chance.choice(REASONING)
    for _ in range(chance.randint(1, 3)):
        add("user", words.text())
        if chance.random() < 0.35:
            calls = _draw_calls(chance, words)
            text = words.text() if chance.random() < 0.3 else ""
            index = len(messages)
            add("assistant", text, tool_calls=calls)
            drawn.values[index] = list(_values_of(calls))
            drawn.texts_with_calls[index] = [text] if text else []
            _add_reasoning(chance, words, drawn, index, key)
            for call in calls:
                add("tool", words.text(), tool_call_id=call["id"], name=call["function"]["name"])
            if chance.random() < 0.2:
                break
        index = len(messages)
        add("assistant", words.text())
        _add_reasoning(chance, words, drawn, index, key)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    trained = answers if chance.random() < 0.6 else answers[-1:]
    drawn.conversation = Conversation(messages=messages[: answers[-1] + 1], trained=tuple(trained), tools=tools)
    return drawn


def _add_reasoning(chance: Random, words: _Words, drawn: Drawn, index: int, key: str) -> None:
    """Add reasoning to some answers, under a key of its own or within the content."""
    message, share = drawn.conversation.messages[index], chance.random()
    if share < 0.15:
        message[key] = words.text()
        drawn.reasoning[index] = [message[key]]
    elif share < 0.3 and message["content"]:
        reasoning = words.text()
        message["content"] = f"<think>\n{reasoning}\n</think>\n\n{message['content']}"
        drawn.reasoning[index] = [reasoning]


def _draw_tools(chance: Random, words: _Words, drawn: Drawn) -> list[dict[str, Any]]:
    tools = []
    for _ in range(chance.randint(1, 2)):
        parameter, name = words.name(), words.name()
        function: dict[str, Any] = {"name": name, "parameters": {"type": "object", "properties": {}}}
        drawn.tools.append(name)
        if chance.random() < 0.8:
            function["description"] = words.text()
            function["parameters"]["properties"][parameter] = {"type": "string", "description": words.text()}
            described = function["parameters"]["properties"][parameter]["description"]
            drawn.tool_details += [function["description"], parameter, described]
        tools.append({"type": "function", "function": function})
    return tools


def _draw_calls(chance: Random, words: _Words) -> list[dict[str, Any]]:
    calls = []
    for index in range(chance.choice((1, 1, 1, 2))):
        arguments: dict[str, Any] = {}
        for kind in chance.sample(("text", "number", "list", "object"), chance.randint(0, 3)):
            values = {
                "text": words.text(),
                "number": words.number(),
                "list": [words.text(), words.number()],
                "object": {words.name(): words.text()},
            }
            arguments[words.name()] = values[kind]
        function = {"name": words.name(), "arguments": arguments}
        calls.append({"type": "function", "id": f"call{index:05d}", "function": function})
    return calls


def _values_of(value: Any) -> Iterator[str]:
    """Yield the names of the called functions, and the names and values of their arguments."""
    for call in value:
        yield call["function"]["name"]
        yield from _leaves(call["function"]["arguments"])


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield name
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    else:
        yield str(value)
