"""Read a row of two answers, in the forms that TRL's trainers read: texts with a prompt, or conversations."""

from collections.abc import Mapping
from typing import Any

from qlora_cli.data.rows.examples import Conversation, Pair, PromptCompletion, RowError, json_type_of
from qlora_cli.data.rows.row_reader import RowReader, as_context

SIDES = ("chosen", "rejected")
SKIP = "Leave such rows out (--on-bad-row skip)."
Side = Conversation | PromptCompletion
Messages = list[dict[str, Any]]


class PairReader(RowReader):
    """Reads rows of a chosen and a rejected answer. Answers that both conversations begin with are not trained."""

    def read_pair(self, row: Mapping[str, Any]) -> Pair:
        """Return `row` as a pair.

        Raises:
            RowError: a part is missing, empty or of the wrong type, or both answers are equal.
        """
        self._messages.unknown_keys.clear()
        values = [self._value(row, side) for side in SIDES]
        if values[0] == values[1] and values[0]:
            raise RowError(f"{self._names} are equal", hint=SKIP)
        chosen, rejected = self._of_texts(row) if isinstance(values[0], str) else self._of_messages(row)
        if isinstance(chosen, Conversation) and isinstance(rejected, Conversation):
            self._record_template_inputs(chosen, rejected)
        return Pair(chosen=chosen, rejected=rejected)

    def _of_texts(self, row: Mapping[str, Any]) -> list[Side]:
        """Return both answers after a prompt of messages, after a question for the chat template, or as plain text."""
        answers = [self._part(row, side, is_answer=True) for side in SIDES]
        prompt = self._optional(row, "prompt")
        if isinstance(prompt, list):
            before = self._prompt_messages(row, prompt)
            return [self._conversation(row, [*before, _answer(text)]) for text in answers]
        if "prompt" in self._layout.columns:
            text, system = self._part(row, "prompt", may_be_empty=True), self._optional_text(row, "system")
            return [self._completion(row, f"{system}\n\n{text}" if system else text, answer) for answer in answers]
        if "question" not in self._layout.columns:
            raise RowError(
                f"{self._names} are texts, and there is no prompt",
                hint="Name its column, as --columns prompt=NAME; or, for the chat template, --columns question=NAME.",
            )
        question = self._part(row, "question")
        if self._use_chat:
            return [self._single_turn(row, question, answer) for answer in answers]
        system = self._optional_text(row, "system")
        text = f"{system}\n\n{question}\n" if system else f"{question}\n"
        return [self._completion(row, text, answer) for answer in answers]

    def _of_messages(self, row: Mapping[str, Any]) -> list[Side]:
        """Return both answers as conversations: with the prompt, or what both begin with, as context."""
        sides = [self._read_messages(row, side) for side in SIDES]
        prompt = self._optional(row, "prompt")
        if isinstance(prompt, list):
            before = self._prompt_messages(row, prompt)
            return [self._conversation(row, [*before, *messages]) for messages in sides]
        shared = _num_shared(*sides)
        before = self._with_system(row, as_context(sides[0][:shared])) if shared else self._text_prompt(row, prompt)
        if shared and isinstance(prompt, str) and not _holds(sides[0][:shared], prompt):
            raise RowError(
                f"{self._layout.columns['prompt']!r} is not among the messages that both answers begin with",
                hint="Write it as the first message of both, or as a list of messages; "
                f"or name other columns: --columns {SIDES[0]}=NAME,{SIDES[1]}=NAME,prompt=NAME.",
            )
        return [self._conversation(row, [*map(dict, before), *messages[shared:]]) for messages in sides]

    def _text_prompt(self, row: Mapping[str, Any], prompt: object) -> Messages:
        """Return the prompt of answers that begin with no common message."""
        if not isinstance(prompt, str) or not prompt.strip():
            raise RowError("its conversations begin with no common message, and there is no prompt", hint=SKIP)
        return self._with_system(row, [{"role": "user", "content": prompt}])

    def _prompt_messages(self, row: Mapping[str, Any], prompt: list[Any]) -> Messages:
        key = self._layout.columns["prompt"]
        return self._with_system(row, as_context(self._messages.read(prompt, key)))

    def _read_messages(self, row: Mapping[str, Any], side: str) -> Messages:
        key, value = self._layout.columns[side], self._value(row, side)
        value = [value] if isinstance(value, Mapping) else value
        if not isinstance(value, list):
            raise RowError(f"{key!r} must be text, or a list of messages, found {json_type_of(value)}")
        if not value:
            raise RowError(f"{key!r} is empty", is_empty=True)
        return self._messages.read(value, key)

    @property
    def _names(self) -> str:
        return " and ".join(repr(self._layout.columns[side]) for side in SIDES)

    def _optional(self, row: Mapping[str, Any], part: str) -> object:
        column = self._layout.columns.get(part)
        return None if column is None else row.get(column)


def _answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _num_shared(chosen: Messages, rejected: Messages) -> int:
    """Return how many messages both begin with, without the last one of either, which is an answer."""
    most = min(len(chosen), len(rejected)) - 1
    return next((index for index in range(most) if chosen[index] != rejected[index]), most)


def _holds(messages: Messages, text: str) -> bool:
    return any(text.strip() == str(message["content"]).strip() for message in messages)
