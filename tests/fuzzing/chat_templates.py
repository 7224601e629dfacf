"""Conversations of any kind through intact and damaged chat templates."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_cli.data.rows.column_formats import recognise
from qlora_cli.data.rows.examples import Example, RowError
from qlora_cli.data.rows.messages import ROLES
from qlora_cli.data.rows.row_reader import RowReader
from qlora_cli.data.rows.unused_columns import UnusedColumnChecker
from qlora_cli.data.tokenizing.tokens import RowTokenizer
from qlora_cli.settings.choices import LossOn
from qlora_cli.settings.models import DataSettings
from tests.fuzzing.frame import Generator, Target, damage
from tests.support.models.chat_tokenizers import FAMILIES, REASONING, make_tokenizer

TOOLS = (
    "{% macro kind(schema, depth) %}{% if schema is mapping %}{% for key, value in schema.items() %}"
    "{{ ' ' * depth }}{{ key }}: {{ kind(value, depth + 1) }}\n{% endfor %}{% else %}{{ schema | tojson }}{% endif %}"
    "{% endmacro %}{% for tool in tools or [] %}{{ kind(tool, 0) }}{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }})"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = "{% macro f(x) %}{{ f([x]) }}{% endmacro %}{% for message in messages %}{{ f(message.role) }}{% endfor %}"
WORDS = [
    "",
    " ",
    "a",
    "yes\n",
    "\n\n",
    "<|im_end|>",
    "</s>",
    "<bos>",
    "{{ x }}",
    "{% if %}",
    "Größe 日本語 🙂",
    "\0",
    "x" * 500,
]
VALUES: list[Any] = [None, 0, -1, 1.5, True, "", "a", [], {}, [[]], 10**30, "null", "[1", '{"a": {}}']
MOST_PARTS = 4
MORE_KEYS = [
    *(
        "train",
        "weight",
        "masked",
        "train_detail",
        "name",
        "reasoning_content",
        "thinking",
        "refusal",
        "function_call",
    ),
    *("from", "value", "images", "mood", "input", "type", "text"),
]
SPECIAL_COLUMNS = [
    "tools",
    "system",
    "chat_template_kwargs",
    "enable_thinking",
    "label",
    "chosen",
    "images",
    "loss_mask",
]
PART_KINDS = ["text", "text", "thinking", "refusal", "tool_use", "tool_call", "image", "text "]


def _value(chance: Generator, depth: int = 0) -> Any:
    """Return a random JSON value, usually small, sometimes very deep."""
    if chance.random() < 0.01:
        deep: Any = 1
        for _ in range(chance.integers(50, 150)):
            deep = {"a": deep} if chance.random() < 0.7 else [deep]
        return deep
    if depth > MOST_PARTS or chance.random() < 0.5:
        return VALUES[chance.integers(len(VALUES))]
    parts = [_value(chance, depth + 1) for _ in range(chance.integers(MOST_PARTS))]
    return parts if chance.random() < 0.5 else {f"k{index}": part for index, part in enumerate(parts)}


def _text(chance: Generator) -> str:
    return "".join(WORDS[index] for index in chance.integers(len(WORDS), size=chance.integers(1, 4)))


def _call(chance: Generator) -> dict[str, Any]:
    arguments = _value(chance)
    return {
        "function": {"name": _text(chance), "arguments": json.dumps(arguments) if chance.random() < 0.5 else arguments}
    }


def _message(chance: Generator) -> dict[str, Any]:
    roles = ["user", "assistant"] if chance.random() < 0.8 else [*ROLES, "nobody"]
    message: dict[str, Any] = {"role": roles[chance.integers(len(roles))], "content": _text(chance)}
    if chance.random() < 0.1:
        message["content"] = _value(chance)
    if chance.random() < 0.1:
        message["tool_calls"] = [_call(chance) for _ in range(chance.integers(3))]
    if chance.random() < 0.05:
        message[MORE_KEYS[chance.integers(len(MORE_KEYS))]] = _value(chance)
    if chance.random() < 0.1:
        message["content"] = [_part(chance) for _ in range(chance.integers(3))]
    return message


def _part(chance: Generator) -> Any:
    kind = PART_KINDS[chance.integers(len(PART_KINDS))]
    part = {"type": kind, "text": _text(chance), **({"train": chance.random() < 0.5} if chance.random() < 0.1 else {})}
    if chance.random() < 0.2:
        part[MORE_KEYS[chance.integers(len(MORE_KEYS))]] = _value(chance)
    return part if chance.random() < 0.9 else _value(chance)


def _row(chance: Generator) -> dict[str, Any]:
    row: dict[str, Any] = {"messages": [_message(chance) for _ in range(chance.integers(6))], "tools": None}
    if chance.random() < 0.2:
        row["tools"] = [{"type": "function", "function": {"name": _text(chance), "parameters": _value(chance)}}]
    if chance.random() < 0.1:
        column = SPECIAL_COLUMNS[chance.integers(len(SPECIAL_COLUMNS))]
        row[column] = _value(chance)
    return {**row, "messages": _value(chance)} if chance.random() < 0.05 else row


def _rounds(directory: Path) -> Callable[[Generator], None]:
    assert directory.is_dir()
    texts = {name: make_tokenizer(name) for name in FAMILIES}
    own = [(texts[name].tokenizer, str(texts[name].tokenizer.chat_template)) for name in FAMILIES]
    own += [(texts["chatml"].tokenizer, template) for template in (REASONING, TOOLS, ENDLESS)]
    settings = DataSettings(dataset=["a"])
    layout = recognise(["messages", *SPECIAL_COLUMNS], settings, "a")
    column_checker = UnusedColumnChecker(layout, settings)
    losses = list(LossOn)

    def play_round(chance: Generator) -> None:
        tokenizer, template = own[chance.integers(len(own))]
        if chance.random() < 0.2:
            template = damage(template.encode(), chance).decode("utf-8", "replace")
        tokenizer.chat_template = template
        loss_on = losses[chance.integers(len(losses))]
        reader, examples = RowReader(layout, loss_on, use_chat=True), list[Example]()
        for _ in range(8):
            row = _row(chance)
            try:
                column_checker.check(row)
                examples.append(reader.read(row))
            except RowError:
                continue
        for tokens in RowTokenizer(tokenizer, loss_on, frozenset()).tokenize(examples):
            assert isinstance(tokens, RowError) or len(tokens.input_ids) == len(tokens.labels) > 0

    return play_round


CHAT = Target(name="chat", prepare=_rounds, num_rounds=200)
