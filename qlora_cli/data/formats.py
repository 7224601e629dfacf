"""Recognise how a data set is written by its columns, and read a row into one of two shapes.

Four formats are known; each row becomes either a `Conversation`, rendered by the chat template, or a
`Completion`, plain text in which the completion is trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_cli.errors import DataError
from qlora_cli.settings.models import DataFormat

COLUMNS: dict[DataFormat, tuple[str, ...]] = {
    DataFormat.MESSAGES: ("messages",),
    DataFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    DataFormat.ALPACA: ("instruction", "output"),
    DataFormat.TEXT: ("text",),
}
ROLES = ("system", "developer", "user", "assistant", "tool")


class RowError(Exception):
    """A row can't be read; the caller knows its number and file."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages of which the assistant's turns from index `first_trained` on are trained."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    first_trained: int = 0


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Text in two parts, of which the second is trained."""

    prompt: str
    completion: str


Example = Conversation | Completion


def recognise(columns: Sequence[str], wanted: DataFormat, name: str) -> DataFormat:
    """Return the format of a data set with these `columns`.

    Raises:
        DataError: no format fits, several do, or the one asked for lacks a column.
    """
    fits = [fmt for fmt, needed in COLUMNS.items() if set(needed) <= set(columns)]
    if wanted != DataFormat.AUTO:
        if wanted not in fits:
            missing = [column for column in COLUMNS[wanted] if column not in columns]
            raise DataError(
                f"{name} has no column {', '.join(missing)}, which the format {wanted.value} needs",
                hint=f"Its columns are {', '.join(columns)}.",
            )
        return wanted
    if not fits:
        known = "; ".join(f"{fmt.value}: {', '.join(needed)}" for fmt, needed in COLUMNS.items())
        raise DataError(
            f"the columns of {name} fit no known format: {', '.join(columns)}",
            hint=f"Rename them to one of: {known}.",
        )
    if len(fits) > 1:
        raise DataError(
            f"the columns of {name} fit several formats: {', '.join(fmt.value for fmt in fits)}",
            hint=f"Choose with --set data.format={fits[0].value}.",
        )
    return fits[0]


def read_row(row: Mapping[str, Any], fmt: DataFormat, *, use_chat: bool) -> Example:
    """Return `row` as an example. `use_chat`: the tokenizer has a chat template for alpaca rows.

    Raises:
        RowError: a value is missing, empty or of the wrong type.
    """
    if fmt == DataFormat.MESSAGES:
        return Conversation(messages=_messages(row["messages"], "messages"), tools=_tools(row))
    if fmt == DataFormat.PROMPT_COMPLETION:
        return _prompt_completion(row)
    if fmt == DataFormat.ALPACA:
        return _alpaca(row, use_chat=use_chat)
    return Completion(prompt="", completion=_text(row, "text"))


def _prompt_completion(row: Mapping[str, Any]) -> Example:
    if isinstance(row["prompt"], list):
        prompt = _messages(row["prompt"], "prompt")
        completion = _messages(row["completion"], "completion")
        return Conversation(messages=prompt + completion, tools=_tools(row), first_trained=len(prompt))
    return Completion(prompt=_text(row, "prompt", may_be_empty=True), completion=_text(row, "completion"))


def _alpaca(row: Mapping[str, Any], *, use_chat: bool) -> Example:
    instruction, output = _text(row, "instruction"), _text(row, "output")
    given = row.get("input")
    if given is not None and not isinstance(given, str):
        raise RowError(f"'input' must be text, found {type(given).__name__}")
    if use_chat:
        content = f"{instruction}\n\n{given}" if given else instruction
        return Conversation(messages=[{"role": "user", "content": content}, {"role": "assistant", "content": output}])
    # The prompt of Stanford Alpaca, section "Data Release" of its README.
    if given:
        prompt = (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:\n"
        )
    else:
        prompt = (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Response:\n"
        )
    return Completion(prompt=prompt, completion=output)


def _text(row: Mapping[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise RowError(f"{key!r} must be text, found {'null' if value is None else type(value).__name__}")
    if not value.strip() and not may_be_empty:
        raise RowError(f"{key!r} is empty")
    return value


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise RowError(f"'tools' must be a list, found {type(tools).__name__}")
    return tools or None


def _messages(value: object, key: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise RowError(f"{key!r} must be a list of at least one message")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise RowError(f"{key}[{index}] must be an object with role and content")
        # Reading into columns gives every message every key; a null is a key that was not there.
        message = {name: part for name, part in message.items() if part is not None}
        if message.get("role") not in ROLES:
            raise RowError(f"{key}[{index}].role is {message.get('role')!r}, not one of {', '.join(ROLES)}")
        if not isinstance(message.get("content", ""), str) or ("content" not in message and len(message) == 1):
            raise RowError(f"{key}[{index}].content must be text")
        message.setdefault("content", "")
        messages.append(message)
    return messages
