"""A conversation: each turn is answered in the context of the turns before it."""

import dataclasses

from qlora_cli.answering.answers import Answer, Listener
from qlora_cli.answering.open_model import OpenModel
from qlora_cli.answering.prompts import Message, check_system, encode, system_messages
from qlora_cli.errors import ModelError
from qlora_cli.hardware.cudnn import without_cudnn_attention
from qlora_cli.settings.models import AnswerSettings


class Chat:
    """The turns so far. If base and adapter both answer, the conversation continues with the adapter's answer."""

    def __init__(self, opened: OpenModel, request: AnswerSettings) -> None:
        self._opened = opened
        self._system = request.system
        self._messages: list[Message] = []
        self._num_asked = 0

    @without_cudnn_attention()
    def ask(self, text: str, listener: Listener) -> tuple[Answer, ...]:
        """Return the answers to the next turn, and append the last to the conversation, even a stopped one.

        Raises:
            ModelError: the conversation has grown beyond the model's positions, or the chat template refuses it.
                The turn is discarded.
            OutOfMemoryError: the GPU has too little memory for the answer.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        ids = encode(self._opened.loaded.tokenizer, [*system_messages(self._system), *messages])
        max_tokens = self._max_tokens(len(ids))
        answerer = dataclasses.replace(self._opened.answerer, max_tokens=max_tokens, turn=self._num_asked)
        answers = tuple(
            self._opened.answer(source, ids, listener, answerer=answerer) for source in self._opened.sources
        )
        self._messages = [*messages, {"role": "assistant", "content": answers[-1].text}]
        self._num_asked += 1
        return answers

    @property
    def messages(self) -> list[Message]:
        """The system prompt, if there is one, and the turns so far."""
        return [*system_messages(self._system), *self._messages]

    def undo(self) -> str | None:
        """Take the last turn back, question and answer, and return the question; None if there is none."""
        if not self._messages:
            return None
        question = self._messages[-2]["content"]
        self._messages = self._messages[:-2]
        return question

    def reset(self) -> None:
        """Clear the conversation; the system prompt stays."""
        self._messages = []

    def set_system(self, system: str | None) -> None:
        """Set another system prompt, or none, from here on.

        Raises:
            ModelError: the chat template does not write it.
        """
        if system is not None:
            check_system(self._opened.loaded.tokenizer, system)
        self._system = system

    def _max_tokens(self, num_tokens: int) -> int:
        """Return the largest length of an answer after a conversation of `num_tokens`."""
        positions, most = self._opened.num_positions, self._opened.answerer.max_tokens
        if positions is None:
            return most
        if num_tokens >= positions:
            raise ModelError(
                f"the conversation has grown to {num_tokens:,} tokens, and the model has {positions:,} positions",
                hint="/reset starts over.",
            )
        return min(most, positions - num_tokens)
