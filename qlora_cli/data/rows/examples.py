"""What a row is read into: a conversation, a text in two parts, or tokens; or what is wrong with it.

The caller knows the file and the number of the row. Imports nothing heavy.
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
LONGEST_MESSAGE = 500  # characters; what a message shows of a row may be as long as the row


class RowError(Exception):
    """A row can't be used; the message says why, and names its key.

    `hint`: what to do, if it is known. `is_empty`: there is nothing wrong but that there is no answer.
    """

    def __init__(self, message: str, *, hint: str | None = None, is_empty: bool = False) -> None:
        super().__init__(message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]}…")
        self.hint = hint
        self.is_empty = is_empty


@dataclass(frozen=True)
class Unreadable:
    """The marker for a value that can't be read, with the reason, in a column that nobody uses."""

    problem: str


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages, and the places of those of the assistant that are trained.

    `template_kwargs`: what the row sets for the chat template besides, such as `enable_thinking`.
    """

    messages: list[dict[str, Any]]
    trained: tuple[int, ...]
    tools: list[Any] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether the template is given messages alone, none of which calls tools."""
        return not (self.tools or self.template_kwargs or any("tool_calls" in message for message in self.messages))


@dataclass(frozen=True, kw_only=True)
class PromptCompletion:
    """Text in two parts, of which the second is trained."""

    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """Tokens as they come, int32 `(seq,)`, and labels of the same length; -100 is not trained."""

    input_ids: Ids
    labels: Ids


Example = Conversation | PromptCompletion | Tokenized


def json_type_of(value: object) -> str:
    """Return what JSON calls the type of `value`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names: Sequence[tuple[type, str]] = ((str, "text"), (int, "a number"), (float, "a number"), (list, "a list"))
    return next((name for kind, name in names if isinstance(value, kind)), "an object")


def is_blank(value: object) -> bool:
    """Whether there is nothing in `value`, as in an empty list, or in a picture that was not given."""
    if isinstance(value, Mapping):
        return all(map(is_blank, value.values()))
    return all(map(is_blank, value)) if isinstance(value, list) else value in (None, "", b"")


def read_json(text: str, where: str) -> Any:
    """Return what JSON text says.

    Raises:
        RowError: it is no JSON, nests too deeply, or has two values under one key.
    """
    return _decoded(text, where, lambda decoder: decoder.decode(text))


def read_json_values(text: str, where: str) -> list[Any]:
    """Return what JSON text says, which may be several values one after another; at least one.

    Raises:
        RowError: it is no JSON, nests too deeply, or has two values under one key.
    """
    return list(_decoded(text, where, partial(_values, text)))


def _values(text: str, decoder: json.JSONDecoder) -> list[Any]:
    values, place = list[Any](), len(text) - len(text.lstrip())
    while place < len(text) or not values:
        value, end = decoder.raw_decode(text, place)
        values.append(value)
        place = next(SPACES.finditer(text, end)).end()
    return values


def _decoded(text: str, where: str, decode: Callable[[json.JSONDecoder], Any]) -> Any:
    repeated: list[RepeatedKey] = []
    try:
        value = decode(json.JSONDecoder(object_pairs_hook=partial(build_object, repeated=repeated)))
    except ValueError as error:
        raise RowError(f"{where} is text, but no JSON: {error}") from error
    except RecursionError as error:
        raise RowError(f"{where}: {TOO_DEEP}") from error
    if text_nests_too_deeply(value, text.count("[") + text.count("{")):
        raise RowError(f"{where}: {TOO_DEEP}")
    if repeated:
        raise RowError(f"{where}: {describe_repeated_key(repeated[0].key)}")
    return value
