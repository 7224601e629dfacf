"""Read a row of a known layout into an example: a conversation, a prompt with its completion, or tokens.

A row that can't be read raises `RowError`; the caller knows the file and the row number.
"""

import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from qlora_cli.data.limits import join_names
from qlora_cli.data.rows.column_formats import RowLayout, nearest
from qlora_cli.data.rows.examples import (
    IGNORE_INDEX,
    Conversation,
    Example,
    Ids,
    PromptCompletion,
    RowError,
    Tokenized,
    json_type_of,
    parse_json,
)
from qlora_cli.data.rows.messages import MessageReader
from qlora_cli.data.rows.tool_calls import read_tools
from qlora_cli.data.rows.train_switches import TRAIN
from qlora_cli.settings.choices import LossOn
from qlora_cli.settings.objectives import DataFormat
from qlora_cli.units import counted

MAX_TOKEN_ID = 2**31 - 1
MAX_ROWS_PER_KEY, MAX_KEYS = 3, 1000  # of the rows that are kept as samples of an unknown key
# Variables that a row can't set for its template: the parameters of transformers' `apply_chat_template`, and messages.
RESERVED_VARIABLES = frozenset(
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


class RowReader:
    """Reads the rows of one layout.

    `use_chat`: questions and instructions become conversations, for a tokenizer that has a chat template.

    Attributes:
        unknown_keys: The number of rows whose messages have a key that is not known, by key.
        rows_with_key: The first of these rows, by key.
        template_variables: The number of rows that set a variable of the chat template, by its name.
    """

    def __init__(self, layout: RowLayout, loss_on: LossOn, *, use_chat: bool) -> None:
        self._layout = layout
        self._loss_on = loss_on
        self._use_chat = use_chat
        self._messages = MessageReader()
        self.unknown_keys: Counter[str] = Counter()
        self.rows_with_key: dict[str, list[Conversation]] = {}
        self.template_variables: Counter[str] = Counter()
        self._readers: dict[DataFormat, Callable[[Mapping[str, Any]], Example]] = {
            DataFormat.MESSAGES: self._conversational,
            DataFormat.SHAREGPT: self._conversational,
            DataFormat.PROMPT_COMPLETION: self._prompt_completion,
            DataFormat.ALPACA: self._alpaca,
            DataFormat.QUESTION_ANSWER: self._question_answer,
            DataFormat.TEXT: self._text,
            DataFormat.TOKENS: self._tokens,
        }

    def read(self, row: Mapping[str, Any]) -> Example:
        """Return `row` as an example.

        Raises:
            RowError: a part is missing, empty or of the wrong type.
        """
        self._messages.unknown_keys.clear()
        example = self._readers[self._layout.format](row)
        if isinstance(example, Conversation):
            self._record_template_inputs(example)
        return example

    def _record_template_inputs(self, *examples: Conversation) -> None:
        """Record the keys and variables of a row, of one or two conversations, that the chat template may ignore."""
        for key in self._messages.unknown_keys:
            self.unknown_keys[key] += 1
            if self.unknown_keys[key] <= MAX_ROWS_PER_KEY and len(self.unknown_keys) <= MAX_KEYS:
                self.rows_with_key.setdefault(key, []).extend(examples)
        if examples[0].template_kwargs:
            self.template_variables.update(examples[0].template_kwargs.keys())

    def _conversational(self, row: Mapping[str, Any]) -> Example:
        key = "messages" if self._layout.format == DataFormat.MESSAGES else "conversations"
        messages = self._messages.read(self._value(row, key), self._layout.columns[key])
        return self._conversation(row, self._with_system(row, messages))

    def _prompt_completion(self, row: Mapping[str, Any]) -> Example:
        prompt, completion = (self._value(row, part) for part in ("prompt", "completion"))
        if isinstance(prompt, list):
            return self._join_messages(row, prompt, completion)
        text, system = self._part(row, "prompt", may_be_empty=True), self._optional_text(row, "system")
        answer = self._part(row, "completion", is_answer=True)
        return self._completion(row, f"{system}\n\n{text}" if system else text, answer)

    def _join_messages(self, row: Mapping[str, Any], prompt: list[Any], completion: object) -> Conversation:
        """Return a prompt of messages and its completion, one or several messages, as a conversation."""
        prompt_key, completion_key = self._layout.columns["prompt"], self._layout.columns["completion"]
        if isinstance(completion, Mapping):
            completion = [completion]
        if not isinstance(completion, list):
            raise RowError(
                f"{completion_key!r} must be a list of messages, as {prompt_key!r} is, "
                f"found {json_type_of(completion)}"
            )
        context = as_context(self._messages.read(prompt, prompt_key))
        return self._conversation(
            row, [*self._with_system(row, context), *self._messages.read(completion, completion_key)]
        )

    def _alpaca(self, row: Mapping[str, Any]) -> Example:
        instruction, output = self._part(row, "instruction"), self._part(row, "output", is_answer=True)
        input_text = self._optional_text(row, "input")
        if self._use_chat:
            return self._single_turn(row, f"{instruction}\n\n{input_text}" if input_text else instruction, output)
        template = ALPACA_WITH_INPUT if input_text else ALPACA_WITHOUT_INPUT
        system = self._optional_text(row, "system")
        prompt = template.format(instruction=instruction, input=input_text)
        return self._completion(row, f"{system}\n\n{prompt}" if system else prompt, output)

    def _question_answer(self, row: Mapping[str, Any]) -> Example:
        question, answer = self._part(row, "question"), self._part(row, "answer", is_answer=True)
        if context := self._optional_text(row, "context"):
            question = f"{context}\n\n{question}"
        if self._use_chat:
            return self._single_turn(row, question, answer)
        system = self._optional_text(row, "system")
        return self._completion(row, f"{system}\n\n{question}\n" if system else f"{question}\n", answer)

    def _text(self, row: Mapping[str, Any]) -> Example:
        return PromptCompletion(prompt="", completion=self._part(row, "text"))

    def _tokens(self, row: Mapping[str, Any]) -> Example:
        ids = _read_ids(self._value(row, "input_ids"), self._layout.columns["input_ids"], minimum=0)
        labels = self._per_token(ids, row, "labels", partial(_read_ids, minimum=IGNORE_INDEX))
        if labels is not None and (is_other := (labels != ids) & (labels != IGNORE_INDEX)).any():
            index, key = int(is_other.argmax()), self._layout.columns["labels"]
            raise RowError(
                f"{key}[{index}] is {labels[index]}: a label is the token itself ({ids[index]}) or {IGNORE_INDEX}"
            )
        labels = ids.copy() if labels is None else labels
        loss_mask, attention_mask = (
            self._per_token(ids, row, mask, _read_mask) for mask in ("loss_mask", "attention_mask")
        )
        if loss_mask is not None:
            labels[loss_mask == 0] = IGNORE_INDEX
        if attention_mask is not None:  # 0 marks padding
            ids, labels = ids[attention_mask == 1], labels[attention_mask == 1]
        if len(ids) == 0:
            raise RowError(f"{self._layout.columns['attention_mask']!r} leaves no token")
        return Tokenized(input_ids=ids, labels=labels)

    def _per_token(
        self, ids: Ids, row: Mapping[str, Any], part: str, read: Callable[[object, str], Ids]
    ) -> Ids | None:
        """Return the values of an optional column, one for each of `ids`."""
        key = self._layout.columns.get(part)
        if key is None or row.get(key) is None:
            return None
        values = read(row[key], key)
        if len(values) != len(ids):
            raise RowError(f"{key!r} has {counted(len(values), 'value')}, the row has {counted(len(ids), 'token')}")
        return values

    def _with_system(self, row: Mapping[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages, preceded by the system prompt if the row has one in a column of its own."""
        system = self._optional_text(row, "system")
        if not system.strip():
            return messages
        first = messages[0]
        if first["role"] not in ("system", "developer"):
            return [{"role": "system", "content": system}, *messages]
        if first["content"].strip() != system.strip():
            raise RowError(
                f"there are two system prompts: the column {self._layout.columns['system']!r}, and message 0",
                hint="Merge them, or remove one.",
            )
        return messages

    def _completion(self, row: Mapping[str, Any], prompt: str, completion: str) -> PromptCompletion:
        for part, value in (
            ("tools", self._tools(row)),
            ("chat_template_kwargs", self._template_kwargs(row)),
            ("enable_thinking", self._thinking(row)),
            ("history", self._history(row)),
        ):
            if value:
                raise RowError(
                    f"{self._layout.columns[part]!r} is for a chat template, but this row is plain text",
                    hint=f"{self._template_hint()}, or leave the column out.",
                )
        return PromptCompletion(prompt=prompt, completion=completion)

    def _template_hint(self) -> str:
        """Return how to have rows of plain text rendered by a chat template."""
        if not self._use_chat:
            return "Give a chat template, such as --chat-template chatml"
        named = f"question={self._layout.columns['prompt']},answer={self._layout.columns['completion']}"
        return f"Let the chat template render it: --format question_answer --columns {shlex.quote(named)}"

    def _single_turn(self, row: Mapping[str, Any], question: str, answer: str) -> Conversation:
        turn = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return self._conversation(row, self._with_system(row, [*self._history(row), *turn]))

    def _history(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return earlier turns: messages, or pairs of question and answer, as in LLaMA-Factory and ms-swift."""
        column = self._layout.columns.get("history")
        pairs = row.get(column) if column is not None else None
        if isinstance(pairs, str) and pairs.strip():
            pairs = parse_json(pairs, f"{column!r}")
        if not pairs:
            return []
        if not isinstance(pairs, list):
            raise RowError(f"{column!r} must be a list of earlier turns, found {json_type_of(pairs)}")
        if all(isinstance(message, Mapping) for message in pairs):
            return self._messages.read(pairs, str(column))
        if not all(isinstance(pair, list) and [type(text) for text in pair] == [str, str] for pair in pairs):
            raise RowError(
                f"{column!r} must hold pairs of two texts, a question and its answer",
                hint="Or write the row as messages.",
            )
        roles = ("user", "assistant")
        return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]

    def _conversation(self, row: Mapping[str, Any], messages: list[dict[str, Any]]) -> Conversation:
        """Decide which answers are trained, and remove the switches, which templates don't know."""
        trained = []
        for index, message in enumerate(messages):
            switch = message.pop(TRAIN, None)
            if message["role"] == "assistant":
                trained += [index] if switch is not False else []
            elif switch and self._loss_on != LossOn.ALL:
                raise RowError(
                    f"message {index} is to be trained, but its role is {message['role']}: only answers are trained",
                    hint="Remove its switch, or train on every token of the rows with --loss-on all.",
                )
        if self._loss_on == LossOn.LAST and trained:
            trained = trained[-1:]
            messages = messages[: trained[0] + 1]  # later messages are neither trained nor context
        for index in trained:
            if not messages[index]["content"].strip() and not messages[index].get("tool_calls"):
                raise RowError(f"the answer in message {index} is empty", is_empty=True)
        return Conversation(
            messages=messages,
            trained=tuple(trained),
            tools=self._tools(row),
            template_kwargs={**self._thinking(row), **self._template_kwargs(row)},
        )

    def _value(self, row: Mapping[str, Any], part: str) -> Any:
        column = self._layout.columns[part]
        if column not in row:
            names = join_names(list(map(repr, row))) or "nothing"
            raise RowError(f"there is no {column!r}, only {names}; the nearest known format is {nearest(row)}")
        return row[column]

    def _part(self, row: Mapping[str, Any], part: str, *, may_be_empty: bool = False, is_answer: bool = False) -> str:
        value, column = self._value(row, part), self._layout.columns[part]
        if not isinstance(value, str):
            raise RowError(f"{column!r} must be text, found {json_type_of(value)}")
        if not may_be_empty and not value.strip():
            raise RowError(f"{column!r} is empty", is_empty=is_answer)
        return value

    def _optional_text(self, row: Mapping[str, Any], part: str) -> str:
        column = self._layout.columns.get(part)
        value = row.get(column) if column is not None else None
        if value is not None and not isinstance(value, str):
            raise RowError(f"{column!r} must be text, found {json_type_of(value)}")
        return value or ""

    def _tools(self, row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        column = self._layout.columns.get("tools")
        return read_tools(row.get(column), f"{column!r}") if column is not None else None

    def _template_kwargs(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the variables that the row sets for the template; a null means that one is not set."""
        column = self._layout.columns.get("chat_template_kwargs")
        kwargs = row.get(column) if column is not None else None
        if isinstance(kwargs, str) and kwargs.strip():
            kwargs = parse_json(kwargs, f"{column!r}")
        if kwargs and not isinstance(kwargs, Mapping):
            raise RowError(f"{column!r} must be an object, found {json_type_of(kwargs)}")
        variables = {name: value for name, value in (kwargs or {}).items() if value is not None}
        for name, value in variables.items():
            if name in RESERVED_VARIABLES:
                raise RowError(f"{column}.{name} can't be set by a row", hint=f"Remove it from {column!r}.")
            if not isinstance(value, str | bool | int | float):
                raise RowError(f"{column}.{name} must be text, a number, true or false, found {json_type_of(value)}")
        return variables

    def _thinking(self, row: Mapping[str, Any]) -> dict[str, bool]:
        """Return the template variable `enable_thinking` if the row sets it in a column of its own, as verl's do."""
        column = self._layout.columns.get("enable_thinking")
        value = row.get(column) if column is not None else None
        if value is not None and not isinstance(value, bool):
            raise RowError(f"{column!r} must be true or false, found {json_type_of(value)}")
        return {} if value is None else {"enable_thinking": value}


def as_context(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages of a prompt, none of whose answers are trained."""
    return [{TRAIN: False, **message} if message["role"] == "assistant" else message for message in messages]


def _read_ids(value: object, key: str, *, minimum: int) -> Ids:
    if not isinstance(value, list) or not value:
        json_type = "an empty one" if value == [] else json_type_of(value)
        raise RowError(f"{key!r} must be a list of token ids, found {json_type}")
    for index, token in enumerate(value):
        if type(token) is not int or not minimum <= token <= MAX_TOKEN_ID:
            raise RowError(f"{key}[{index}] is {token!r}, not a token id")
    return np.array(value, dtype=np.int32)


def _read_mask(value: object, key: str) -> Ids:
    if not isinstance(value, list):
        raise RowError(f"{key!r} must be a list of 0 and 1, found {json_type_of(value)}")
    for index, element in enumerate(value):
        if not isinstance(element, int | float) or element not in (0, 1):  # False and True equal 0 and 1
            raise RowError(f"{key}[{index}] is {element!r}: a mask holds 0 and 1, or false and true")
    return np.array(value, dtype=np.int32)
