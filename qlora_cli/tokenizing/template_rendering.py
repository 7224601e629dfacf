"""Render conversations by a tokenizer's chat template, in seconds at most.

A template is a program that comes with a model. It can reach nothing, for it runs in Jinja's sandbox, but it can call
itself without an end, loop for hours, or take all memory. Each ends here, by an error that names the template.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_cli.bounded import Result, TimeOutError, try_apart, within_bytes, within_seconds
from qlora_cli.errors import ModelError
from qlora_cli.units import MIB, counted

Messages = Sequence[dict[str, Any]]

# What it does to messages that it was not written for may fail in any way. NameError: Jinja writes what is infinite as
# `inf`. RuntimeError, of which one in ENDLESS is a kind: a `cycler` of nothing.
TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError),
    *(NameError, RuntimeError),
)
# What becomes of one that nests without an end, when it is compiled or when it runs.
ENDLESS = (RecursionError, MemoryError, SyntaxError, SystemError)
LONGEST_SECONDS = 4.0  # for one conversation; they are rendered within milliseconds
MOST_BYTES = 512 * MIB  # for anything that is not there for the sake of long messages
MOST_BYTES_PER_CHARACTER = 32  # of the messages: eight copies of the widest
LONGEST_TEXT = 2**27  # characters; twice what the longest row has
OTHER_TEMPLATE = "Correct it, or give another with --chat-template (a .jinja file, or chatml)."

SPECIAL_TOKENS: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "</s>")
_USER, _ANSWER = {"role": "user", "content": "text"}, {"role": "assistant", "content": "text"}
_CALL = {"id": "call000000", "type": "function", "function": {"name": "name", "arguments": {"key": "text"}}}
_PARAMETERS = {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]}
_TOOL = {"type": "function", "function": {"name": "name", "description": "text", "parameters": _PARAMETERS}}
# What a template is tried on, with the tools of each.
TRIED: tuple[tuple[Messages, list[dict[str, Any]] | None], ...] = (
    ([_USER], None),
    ([{"role": "system", "content": "text"}, _USER, _ANSWER], None),
    ([{"role": "user", "content": [{"type": "text", "text": "text"}]}], None),
    (
        [
            _USER,
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "name": "name", "tool_call_id": "call000000", "content": "text"},
            {**_ANSWER, "reasoning_content": "text"},
        ],
        [_TOOL],
    ),
    ([_USER, _ANSWER] * 20, None),
)


class RefusedError(Exception):
    """The template has no text for a conversation; the message says why."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    tools: list[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
    asks_answer: bool = False,
) -> str:
    """Return a conversation as text, and with what asks for an answer after it if `asks_answer`.

    `variables` are given to the template by their names, none of which is a parameter of `apply_chat_template`.

    Raises:
        RefusedError: the template refuses it.
        ModelError: the template calls itself without an end, nests too deeply, takes seconds or far too much
            memory, or writes far too much.
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
        text = within_limits(apply, _characters(messages) + len(str(tools)) + len(str(variables)))
    except TimeOutError as error:
        raise ModelError(
            f"the chat template did not end within {LONGEST_SECONDS:.0f} s, for {given}", hint=OTHER_TEMPLATE
        ) from error
    except MemoryError as error:
        raise endless(error) from error
    except ENDLESS as error:
        if tools or any("tool_calls" in message for message in messages):
            raise RefusedError("it calls itself too often for what tools and calls of them hold") from error
        raise endless(error) from error
    except TEMPLATE_ERRORS as error:
        raise RefusedError(str(error)) from error
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
        return within_limits(apply, sum(map(_characters, conversations)))
    except (*TEMPLATE_ERRORS, *ENDLESS, TimeOutError):
        return None


@lru_cache(maxsize=32)
def try_template(text: str) -> None:
    """Compile a template and render some conversations by it, in a copy of this process, once a text.

    Raises:
        DeadlyError: it ends the process that renders it, or one operation of it does not end.
    """

    def render_some() -> None:
        # A template may refuse some of them; and the time it takes between operations is reported with rows.
        for (messages, tools), asks_answer in itertools.product(TRIED, (False, True)):
            with suppress(*TEMPLATE_ERRORS, *ENDLESS):
                render_jinja_template(
                    [messages],
                    tools=tools,
                    chat_template=text,
                    add_generation_prompt=asks_answer,
                    **SPECIAL_TOKENS,
                )

    try_apart(lambda: within_bytes(render_some, MOST_BYTES), LONGEST_SECONDS, LONGEST_SECONDS)


def within_limits(call: Callable[[], Result], num_characters: int = 0) -> Result:
    """Return what `call` returns, which runs or compiles a template, for messages of `num_characters`.

    Raises:
        TimeOutError: it takes too long.
        MemoryError: it takes too much memory.
    """
    # Memory around time: a time-out must not fall between a limit and its end.
    most_bytes = MOST_BYTES + MOST_BYTES_PER_CHARACTER * num_characters
    return within_bytes(lambda: within_seconds(call, LONGEST_SECONDS), most_bytes)


def endless(error: BaseException) -> ModelError:
    """Return the error for a template that ended in one of `ENDLESS`."""
    kind = type(error).__name__
    return ModelError(
        f"the chat template calls itself without an end, nests too deeply or takes too much memory ({kind})",
        hint=OTHER_TEMPLATE,
    )


def _characters(messages: Messages) -> int:
    return sum(
        len(value) if isinstance(value, str) else len(str(value)) for message in messages for value in message.values()
    )
