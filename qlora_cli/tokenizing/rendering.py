"""Render conversations by a tokenizer's chat template, in seconds at most.

A template is a program that comes with a model. It can reach nothing, for it runs in Jinja's sandbox, but it can call
itself without an end, or loop for hours. Either ends here, by an error that names the template.
"""

import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qlora_cli.errors import ModelError
from qlora_cli.units import counted

Messages = Sequence[dict[str, Any]]
Result = TypeVar("Result")

# What it does to messages that it was not written for may fail in any way.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
# What becomes of one that nests without an end, when it is compiled or when it runs.
ENDLESS = (RecursionError, MemoryError, SyntaxError, SystemError)
LONGEST_SECONDS = 4.0  # for one conversation; they are rendered within milliseconds
LONGEST_TEXT = 2**27  # characters; twice what the longest row has
AGAIN_SECONDS = 0.5  # a time-out that falls into a destructor is lost, so that it is repeated
OTHER_TEMPLATE = "Correct it, or give another with --chat-template (a .jinja file, or chatml)."


class RefusedError(Exception):
    """The template has no text for a conversation; the message says why."""


class _TimeOutError(Exception):
    """The time is over."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    tools: list[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
    asks_answer: bool = False,
) -> str:
    """Return a conversation as text, and with what asks for an answer behind it if `asks_answer`.

    `variables` are given to the template by their names, none of which is a parameter of `apply_chat_template`.

    Raises:
        RefusedError: the template refuses it.
        ModelError: the template calls itself without an end, nests too deeply, takes seconds, or writes far too much.
    """

    def apply() -> str:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                tokenize=False,
                add_generation_prompt=asks_answer,
                **(variables or {}),
            )
        )

    size = sum(len(str(message.get("content"))) for message in messages)
    given = f"{counted(len(messages), 'message')} of {counted(size, 'character')}"
    try:
        text = _within_seconds(apply)
    except TEMPLATE_ERRORS as error:
        raise RefusedError(str(error)) from error
    except _TimeOutError as error:
        raise ModelError(
            f"the chat template did not end within {LONGEST_SECONDS:.0f} s, for {given}", hint=OTHER_TEMPLATE
        ) from error
    except ENDLESS as error:
        if tools or any("tool_calls" in message for message in messages):
            raise RefusedError("it calls itself too often for what tools and calls of them hold") from error
        raise endless(error) from error
    if len(text) > LONGEST_TEXT:
        raise ModelError(
            f"the chat template writes {counted(len(text), 'character')} for {given}", hint=OTHER_TEMPLATE
        )
    return text


def render_all(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages]) -> list[str] | None:
    """Return conversations without tools as texts, at less cost than one by one; None if that fails for one.

    Raises:
        ModelError: as `render` does, for the first of them.
    """
    try:
        render(tokenizer, conversations[0])  # before many as large are held at once
    except RefusedError:
        return None

    def apply() -> list[str]:
        found = tokenizer.apply_chat_template([list(messages) for messages in conversations], tokenize=False)
        return [str(text) for text in found]

    try:
        return _within_seconds(apply)
    except (*TEMPLATE_ERRORS, *ENDLESS, _TimeOutError):
        return None


def endless(error: BaseException) -> ModelError:
    """Return the error for a template that ended in one of `ENDLESS`."""
    kind = type(error).__name__
    return ModelError(
        f"the chat template calls itself without an end, nests too deeply or takes all memory ({kind})",
        hint=OTHER_TEMPLATE,
    )


def _within_seconds(call: Callable[[], Result]) -> Result:
    """Return what `call` returns; where signals can't be handled, which is outside of the main thread, without limit.

    Raises:
        _TimeOutError: it takes too long.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return call()

    def end(_number: int, _frame: FrameType | None) -> None:
        raise _TimeOutError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_SECONDS, AGAIN_SECONDS)
    try:
        try:
            return call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _TimeOutError:  # which may have come in the line above
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)
