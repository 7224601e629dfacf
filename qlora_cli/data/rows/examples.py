"""The examples that rows are read into, a conversation, a prompt with its completion, or tokens, and `RowError`.

The caller knows the file and the row number. Imports nothing heavy.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.limits import TOO_DEEP, text_nests_too_deeply
from qlora_cli.data.rows.json_objects import RepeatedKey, build_object, describe_repeated_key

Ids = NDArray[np.int32]

PLAIN_KEYS = {"role", "content"}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
IGNORE_INDEX = -100  # the label that the loss skips
SPACES = re.compile(r"\s*")
MAX_MESSAGE_CHARACTERS = 500  # a message may quote a part of the row, which may be long


class RowError(Exception):
    """A row that can't be used; the message names the key and the problem.

    `hint`: what to do about it, if known. `is_empty`: the only problem is that the answer is empty.
    """

    def __init__(self, message: str, *, hint: str | None = None, is_empty: bool = False) -> None:
        is_long = len(message) > MAX_MESSAGE_CHARACTERS
        super().__init__(f"{message[:MAX_MESSAGE_CHARACTERS]}…" if is_long else message)
        self.hint = hint
        self.is_empty = is_empty


@dataclass(frozen=True)
class Unreadable:
    """Stands for a value that can't be read, in a column that is not used; `problem` says why."""

    problem: str


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages, and the indices of the assistant's messages that are trained.

    `template_kwargs`: other variables that the row passes to the chat template, such as `enable_thinking`.
    """

    messages: list[dict[str, Any]]
    trained: tuple[int, ...]
    tools: list[Any] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether the template gets nothing but messages, none of which calls tools."""
        has_variables = self.tools is not None or self.template_kwargs
        return not (has_variables or any("tool_calls" in message for message in self.messages))


@dataclass(frozen=True, kw_only=True)
class PromptCompletion:
    """Text in two parts, of which the second is trained."""

    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """Token ids and labels of a pretokenized row, both int32 `(seq,)`; tokens with the label -100 are not trained."""

    input_ids: Ids
    labels: Ids


Example = Conversation | PromptCompletion | Tokenized


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one prompt, each with the prompt: the chosen one, and the one that it is preferred to."""

    chosen: Conversation | PromptCompletion
    rejected: Conversation | PromptCompletion


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """An answer that says by a label whether it is wanted."""

    answer: Example
    is_desirable: bool


def json_type_of(value: object) -> str:
    """Return the JSON type of `value`, as messages name it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names: Sequence[tuple[type, str]] = ((str, "text"), (int, "a number"), (float, "a number"), (list, "a list"))
    return next((name for kind, name in names if isinstance(value, kind)), "an object")


def is_blank(value: object) -> bool:
    """Return whether `value` is empty, or holds only empty values, as the object of a picture that is missing does."""
    if isinstance(value, Mapping):
        return all(map(is_blank, value.values()))
    return all(map(is_blank, value)) if isinstance(value, list) else value in (None, "", b"")


def parse_json(text: str, where: str) -> Any:
    """Return the value of JSON text.

    Raises:
        RowError: it is not JSON, nests too deeply, or repeats a key with another value.
    """
    return _decoded(text, where, lambda decoder: decoder.decode(text))


def parse_json_values(text: str, where: str) -> list[Any]:
    """Return the values of text that holds one or more JSON values, one after another.

    Raises:
        RowError: it is not JSON, nests too deeply, or repeats a key with another value.
    """
    return list(_decoded(text, where, partial(_values, text)))


def _values(text: str, decoder: json.JSONDecoder) -> list[Any]:
    values, start = list[Any](), len(text) - len(text.lstrip())
    while start < len(text) or not values:
        value, end = decoder.raw_decode(text, start)
        values.append(value)
        start = next(SPACES.finditer(text, end)).end()
    return values


def _decoded(text: str, where: str, decode: Callable[[json.JSONDecoder], Any]) -> Any:
    repeated: list[RepeatedKey] = []
    try:
        value = decode(json.JSONDecoder(object_pairs_hook=partial(build_object, repeated=repeated)))
    except ValueError as error:
        raise RowError(f"{where} is text, but not JSON: {error}") from error
    except RecursionError as error:
        raise RowError(f"{where}: {TOO_DEEP}") from error
    if text_nests_too_deeply(value, text.count("[") + text.count("{")):
        raise RowError(f"{where}: {TOO_DEEP}")
    if repeated:
        raise RowError(f"{where}: {describe_repeated_key(repeated[0].key)}")
    return value
