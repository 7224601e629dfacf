"""Read a row of a known layout into an example: a conversation, a text in two parts, or tokens.

What a row lacks or has wrong is a `RowError`; the caller knows the file and the number of the row.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.formats import Layout, nearest
from qlora_cli.data.limits import TOO_DEEP, listed, text_nests_too_deeply
from qlora_cli.settings.choices import DataFormat, LossOn
from qlora_cli.units import counted

Ids = NDArray[np.int32]

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
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
}
PLAIN_KEYS, PLAIN_ROLES = {"role", "content"}, {"system", "user", "assistant", "tool"}
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
# Whether a message is trained; `weight` is what OpenAI's fine-tuning format calls it.
SWITCHES = ("train", "weight")
IGNORED = -100  # the label that the loss skips
MOST_IDS = 2**31
# The parameters of transformers' `apply_chat_template`, and the messages: what a row can't set for its template.
OWN_VARIABLES = frozenset(
    [
        "messages",
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "kwargs",
        "self",
    ]
)
LONGEST_MESSAGE = 500  # characters; what a message shows of a row may be as long as the row

# The prompt of Stanford Alpaca, section "Data Release" of its README.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


class RowError(Exception):
    """A row can't be used; the message says why, and names its key.

    `hint`: what to do, if it is known. `is_empty`: there is nothing wrong but that there is no answer.
    """

    def __init__(self, message: str, *, hint: str | None = None, is_empty: bool = False) -> None:
        super().__init__(message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]}…")
        self.hint = hint
        self.is_empty = is_empty


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
class Completion:
    """Text in two parts, of which the second is trained."""

    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """Tokens as they come, int32 `(seq,)`, and labels of the same length; -100 is not trained."""

    input_ids: Ids
    labels: Ids


Example = Conversation | Completion | Tokenized


class RowReader:
    """Reads the rows of one layout. `use_chat`: the tokenizer has a chat template, for rows that have no own text."""

    def __init__(self, layout: Layout, loss_on: LossOn, *, use_chat: bool) -> None:
        self._layout = layout
        self._loss_on = loss_on
        self._use_chat = use_chat
        self._read = {
            DataFormat.MESSAGES: self._messages,
            DataFormat.SHAREGPT: self._messages,
            DataFormat.PROMPT_COMPLETION: self._prompt_completion,
            DataFormat.ALPACA: self._alpaca,
            DataFormat.QUESTION_ANSWER: self._question_answer,
            DataFormat.TEXT: self._text,
            DataFormat.TOKENS: self._tokens,
        }[layout.format]

    def read(self, row: Mapping[str, Any]) -> Example:
        """Return `row` as an example.

        Raises:
            RowError: a part is missing, empty or of the wrong type.
        """
        return self._read(row)

    def _messages(self, row: Mapping[str, Any]) -> Example:
        key = "messages" if self._layout.format == DataFormat.MESSAGES else "conversations"
        messages = _read_messages(self._value(row, key), self._layout.columns[key])
        return self._conversation(row, self._with_system(row, messages))

    def _prompt_completion(self, row: Mapping[str, Any]) -> Example:
        if not isinstance(row.get(self._layout.columns["prompt"]), list):
            prompt_text, system = self._part(row, "prompt", may_be_empty=True), self._optional_text(row, "system")
            completion_text = self._part(row, "completion", is_answer=True)
            return self._completion(row, f"{system}\n\n{prompt_text}" if system else prompt_text, completion_text)
        if not isinstance(row.get(self._layout.columns["completion"]), list):
            raise RowError(
                f"{self._layout.columns['completion']!r} must be a list of messages, as "
                f"{self._layout.columns['prompt']!r} is, found {kind_of(row.get(self._layout.columns['completion']))}"
            )
        prompt = _read_messages(row[self._layout.columns["prompt"]], self._layout.columns["prompt"])
        completion = _read_messages(self._value(row, "completion"), self._layout.columns["completion"])
        # Answers in the prompt are given, not trained.
        given = [{"train": False, **message} if message["role"] == "assistant" else message for message in prompt]
        return self._conversation(row, self._with_system(row, given) + completion)

    def _alpaca(self, row: Mapping[str, Any]) -> Example:
        instruction, output = self._part(row, "instruction"), self._part(row, "output", is_answer=True)
        given = self._optional_text(row, "input")
        if self._use_chat:
            return self._asked(row, f"{instruction}\n\n{given}" if given else instruction, output)
        template = ALPACA_WITH_INPUT if given else ALPACA_WITHOUT_INPUT
        system = self._optional_text(row, "system")
        prompt = template.format(instruction=instruction, input=given)
        return self._completion(row, f"{system}\n\n{prompt}" if system else prompt, output)

    def _question_answer(self, row: Mapping[str, Any]) -> Example:
        question, answer = self._part(row, "question"), self._part(row, "answer", is_answer=True)
        if context := self._optional_text(row, "context"):
            question = f"{context}\n\n{question}"
        if self._use_chat:
            return self._asked(row, question, answer)
        system = self._optional_text(row, "system")
        return self._completion(row, f"{system}\n\n{question}\n" if system else f"{question}\n", answer)

    def _text(self, row: Mapping[str, Any]) -> Example:
        return Completion(prompt="", completion=self._part(row, "text"))

    def _tokens(self, row: Mapping[str, Any]) -> Example:
        ids = _read_ids(self._value(row, "input_ids"), self._layout.columns["input_ids"], least=0)
        labels = self._numbers(row, "labels", ids, least=IGNORED)
        if labels is not None and (other := (labels != ids) & (labels != IGNORED)).any():
            place, key = int(other.argmax()), self._layout.columns["labels"]
            raise RowError(
                f"{key}[{place}] is {labels[place]}: a label is the token itself ({ids[place]}) or {IGNORED}"
            )
        labels = ids.copy() if labels is None else labels
        trained, fed = (self._numbers(row, mask, ids, least=0) for mask in ("loss_mask", "attention_mask"))
        if trained is not None:
            labels[trained == 0] = IGNORED
        if fed is not None:  # what is masked is padding
            ids, labels = ids[fed != 0], labels[fed != 0]
        if len(ids) == 0:
            raise RowError(f"{self._layout.columns['attention_mask']!r} leaves no token")
        return Tokenized(input_ids=ids, labels=labels)

    def _numbers(self, row: Mapping[str, Any], part: str, ids: Ids, *, least: int) -> Ids | None:
        """Return the numbers in an optional column, one for each token."""
        key = self._layout.columns.get(part)
        if key is None or row.get(key) is None:
            return None
        found = _read_ids(row[key], key, least=least)
        if len(found) != len(ids):
            raise RowError(f"{key!r} has {counted(len(found), 'value')}, the row has {counted(len(ids), 'token')}")
        return found

    def _with_system(self, row: Mapping[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages behind a system prompt that has a column of its own."""
        system = self._optional_text(row, "system")
        if not system or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": system}, *messages]

    def _completion(self, row: Mapping[str, Any], prompt: str, completion: str) -> Completion:
        for part, found in (("tools", self._tools(row)), ("chat_template_kwargs", self._template_kwargs(row))):
            if found:
                raise RowError(
                    f"{self._layout.columns[part]!r} is for a chat template, and this row is plain text",
                    hint="Write it as messages, or leave the column out.",
                )
        return Completion(prompt=prompt, completion=completion)

    def _asked(self, row: Mapping[str, Any], question: str, answer: str) -> Conversation:
        system = self._optional_text(row, "system")
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return Conversation(
            messages=messages,
            trained=(len(messages) - 1,),
            tools=self._tools(row),
            template_kwargs=self._template_kwargs(row),
        )

    def _conversation(self, row: Mapping[str, Any], messages: list[dict[str, Any]]) -> Conversation:
        """Settle which answers are trained, and take the switches out, which no template knows."""
        trained = []
        for place, message in enumerate(messages):
            switches = [_read_switch(message.pop(key), place, key) for key in SWITCHES if key in message]
            if message["role"] == "assistant" and all(switches):
                trained.append(place)
        if self._loss_on == LossOn.LAST and trained:
            trained = trained[-1:]
            messages = messages[: trained[0] + 1]  # what follows is neither trained nor seen
        for place in trained:
            if not messages[place]["content"].strip() and not messages[place].get("tool_calls"):
                raise RowError(f"the answer in message {place} is empty", is_empty=True)
        return Conversation(
            messages=messages,
            trained=tuple(trained),
            tools=self._tools(row),
            template_kwargs=self._template_kwargs(row),
        )

    def _value(self, row: Mapping[str, Any], part: str) -> Any:
        column = self._layout.columns[part]
        if column not in row:
            found = listed(list(map(repr, row))) or "nothing"
            raise RowError(f"there is no {column!r}, but {found}; the nearest known format is {nearest(row)}")
        return row[column]

    def _part(self, row: Mapping[str, Any], part: str, *, may_be_empty: bool = False, is_answer: bool = False) -> str:
        value, column = self._value(row, part), self._layout.columns[part]
        if not isinstance(value, str):
            raise RowError(f"{column!r} must be text, found {kind_of(value)}")
        if not may_be_empty and not value.strip():
            raise RowError(f"{column!r} is empty", is_empty=is_answer)
        return value

    def _optional_text(self, row: Mapping[str, Any], part: str) -> str:
        column = self._layout.columns.get(part)
        value = row.get(column) if column is not None else None
        if value is not None and not isinstance(value, str):
            raise RowError(f"{column!r} must be text, found {kind_of(value)}")
        return value or ""

    def _tools(self, row: Mapping[str, Any]) -> list[Any] | None:
        column = self._layout.columns.get("tools")
        tools = row.get(column) if column is not None else None
        if isinstance(tools, str) and tools.strip():
            tools = _read_json(tools, f"{column!r}")
        if tools and not isinstance(tools, list):
            raise RowError(f"{column!r} must be a list of tools, found {kind_of(tools)}")
        return tools or None

    def _template_kwargs(self, row: Mapping[str, Any]) -> dict[str, Any]:
        column = self._layout.columns.get("chat_template_kwargs")
        given = row.get(column) if column is not None else None
        if isinstance(given, str) and given.strip():
            given = _read_json(given, f"{column!r}")
        if given and not isinstance(given, Mapping):
            raise RowError(f"{column!r} must be an object, found {kind_of(given)}")
        # Reading into columns gives every row every key; a null is a key that was not there.
        found = {name: value for name, value in (given or {}).items() if value is not None}
        for name, value in found.items():
            if name in OWN_VARIABLES:
                raise RowError(f"{column}.{name} can't be set by a row", hint=f"Take it out of {column!r}.")
            if not isinstance(value, str | bool | int | float):
                raise RowError(f"{column}.{name} must be text, a number, true or false, found {kind_of(value)}")
        return found


def kind_of(value: object) -> str:
    """Return what JSON calls the type of `value`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names: Sequence[tuple[type, str]] = ((str, "text"), (int, "a number"), (float, "a number"), (list, "a list"))
    return next((name for kind, name in names if isinstance(value, kind)), "an object")


def _read_messages(value: object, key: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        value = _read_json(value, repr(key))
    if not isinstance(value, list) or not value:
        found = "an empty one" if value == [] else kind_of(value)
        raise RowError(f"{key!r} must be a list of at least one message, found {found}")
    return [_read_message(message, f"{key}[{place}]") for place, message in enumerate(value)]


def _read_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RowError(f"{where} must be an object with role and content, found {kind_of(message)}")
    if message.keys() == PLAIN_KEYS and message["role"] in PLAIN_ROLES and type(message["content"]) is str:
        return dict(message)  # nearly all are
    # Reading into columns gives every message every key; a null is a key that was not there.
    found = {name: part for name, part in message.items() if part is not None}
    role_key = next((key for key in ROLE_KEYS if key in found), None)
    if role_key is None:
        raise RowError(f"{where} has no role, but {listed(list(map(repr, found))) or 'nothing'}")
    given = found.pop(role_key)
    role = ROLES.get(given.lower()) if isinstance(given, str) else None
    if role is None:
        raise RowError(f"{where}.{role_key} is {given!r}, not one of {', '.join(ROLES)}")
    content_key = next((key for key in CONTENT_KEYS if key in found), None)
    content = "" if content_key is None else _read_content(found.pop(content_key), f"{where}.{content_key}")
    if given == "function_call":
        content, found["tool_calls"] = "", [{"type": "function", "function": _read_json(content, where)}]
    if "tool_calls" in found:
        found["tool_calls"] = _read_tool_calls(found["tool_calls"], where)
    elif content_key is None:
        raise RowError(f"{where} has no content")
    return {"role": role, "content": content, **found}


def _read_content(value: object, where: str) -> str:
    """Return a message's text; parts of text, as OpenAI writes them too, are joined."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = []
        for part in value:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
                raise RowError(f"{where} holds {kind}, and only text can be trained")
            texts.append(part["text"])
        return "".join(texts)
    raise RowError(f"{where} must be text, found {kind_of(value)}")


def _read_tool_calls(calls: object, where: str) -> list[Any]:
    """Return tool calls with arguments as objects: OpenAI writes them as JSON text, templates write it again."""
    if not isinstance(calls, list):
        raise RowError(f"{where}.tool_calls must be a list, found {kind_of(calls)}")
    read = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(f"{where}.tool_calls must hold functions with a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _read_json(arguments, f"{where}.tool_calls[].function.arguments") if arguments.strip() else {}
        function = {**function, "arguments": {} if arguments is None else arguments}
        read.append(
            {**call, "function": function} if "function" in call else {"type": "function", "function": function}
        )
    return read


def _read_json(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RowError(f"{where} is text, but no JSON: {error}") from error
    except RecursionError as error:
        raise RowError(f"{where}: {TOO_DEEP}") from error
    if text_nests_too_deeply(value, text.count("[") + text.count("{")):
        raise RowError(f"{where}: {TOO_DEEP}")
    return value


def _read_switch(value: object, place: int, key: str) -> bool:
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise RowError(f"{key!r} of message {place} must be true or false, found {value!r}")


def _read_ids(value: object, key: str, *, least: int) -> Ids:
    if not isinstance(value, list) or not value:
        found = "an empty one" if value == [] else kind_of(value)
        raise RowError(f"{key!r} must be a list of token ids, found {found}")
    for place, token in enumerate(value):
        if type(token) is not int or not least <= token < MOST_IDS:
            raise RowError(f"{key}[{place}] is {token!r}, no token id")
    return np.array(value, dtype=np.int32)
