"""Render conversations with a tokenizer's chat template, within limits on time and memory.

A template is a program that comes with a model. Jinja's sandbox denies it access to anything else, but it can recurse
endlessly, loop for hours, or use all memory. Each of these ends in an error that names the template.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_cli.bounded import Result, TimeLimitError, try_in_fork, within_bytes, within_seconds
from qlora_cli.errors import ModelError
from qlora_cli.units import MIB, counted

Messages = Sequence[dict[str, Any]]

# On messages that it was not written for, a template may fail in any way. NameError: Jinja writes infinity as `inf`.
# RuntimeError, a base class of one in ENDLESS: an empty `cycler`.
TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError),
    *(NameError, RuntimeError),
)
# What endless nesting raises, in compiling or rendering.
ENDLESS = (RecursionError, MemoryError, SyntaxError, SystemError)
LONGEST_SECONDS = 4.0  # for one conversation; normally it takes milliseconds
MOST_BYTES = 512 * MIB  # apart from what long messages need
MOST_BYTES_PER_CHARACTER = 32  # of the messages: eight copies at four bytes each
LONGEST_TEXT = 2**27  # characters; twice the longest row
OTHER_TEMPLATE = "Correct it, or give another with --chat-template (a .jinja file, or chatml)."

SPECIAL_TOKENS: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "</s>")
_USER, _ANSWER = {"role": "user", "content": "text"}, {"role": "assistant", "content": "text"}
_CALL = {"id": "call000000", "type": "function", "function": {"name": "name", "arguments": {"key": "text"}}}
_PARAMETERS = {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]}
_TOOL = {"type": "function", "function": {"name": "name", "description": "text", "parameters": _PARAMETERS}}
# The conversations that a template is tried on, each with its tools.
TRIAL_CONVERSATIONS: tuple[tuple[Messages, list[dict[str, Any]] | None], ...] = (
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


class TemplateRefusalError(Exception):
    """The template refuses a conversation; the message says why."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    tools: list[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """Render a conversation as text, followed by the generation prompt if `add_generation_prompt`.

    `variables` are passed to the template by name; none is a parameter of `apply_chat_template`.

    Raises:
        TemplateRefusalError: the template refuses it.
        ModelError: the template recurses endlessly, nests too deeply, takes seconds or far too much memory, or
            writes far too much.
    """

    def apply() -> str:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(variables or {}),
            )
        )

    size = sum(len(str(message.get("content"))) for message in messages)
    subject = f"{counted(len(messages), 'message')} of {counted(size, 'character')}"
    try:
        text = within_limits(apply, _num_characters(messages) + len(str(tools)) + len(str(variables)))
    except TimeLimitError as error:
        raise ModelError(
            f"the chat template did not end within {LONGEST_SECONDS:.0f} s, for {subject}", hint=OTHER_TEMPLATE
        ) from error
    except MemoryError as error:
        raise endless_error(error) from error
    except ENDLESS as error:
        if tools or any("tool_calls" in message for message in messages):
            raise TemplateRefusalError("it recurses too deeply for what its tools and tool calls hold") from error
        raise endless_error(error) from error
    except TEMPLATE_ERRORS as error:
        raise TemplateRefusalError(str(error)) from error
    if len(text) > LONGEST_TEXT:
        raise ModelError(
            f"the chat template writes {counted(len(text), 'character')} for {subject}", hint=OTHER_TEMPLATE
        )
    return text


def render_all(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages]) -> list[str] | None:
    """Render conversations without tools, cheaper than one by one; return None if one of them fails.

    Raises:
        ModelError: as in `render`, for the first of them.
    """
    try:
        render(tokenizer, conversations[0])  # before many as large are held in memory at once
    except TemplateRefusalError:
        return None

    def apply() -> list[str]:
        texts = tokenizer.apply_chat_template([list(messages) for messages in conversations], tokenize=False)
        return [str(text) for text in texts]

    try:
        return within_limits(apply, sum(map(_num_characters, conversations)))
    except (*TEMPLATE_ERRORS, *ENDLESS, TimeLimitError):
        return None


@lru_cache(maxsize=32)
def try_template(text: str) -> None:
    """Compile a template and render some conversations with it, in a copy of this process, once per text.

    Raises:
        UnsafeCodeError: it crashes the process that renders it, or one of its operations does not end.
    """

    def render_some() -> None:
        # A template may refuse some of them; the time that it takes in total is checked for each row.
        for (messages, tools), add_generation_prompt in itertools.product(TRIAL_CONVERSATIONS, (False, True)):
            with suppress(*TEMPLATE_ERRORS, *ENDLESS):
                render_jinja_template(
                    [messages],
                    tools=tools,
                    chat_template=text,
                    add_generation_prompt=add_generation_prompt,
                    **SPECIAL_TOKENS,
                )

    try_in_fork(lambda: within_bytes(render_some, MOST_BYTES), LONGEST_SECONDS, LONGEST_SECONDS)


def within_limits(call: Callable[[], Result], num_characters: int = 0) -> Result:
    """Return the result of `call`, which renders or compiles a template for messages of `num_characters`.

    Raises:
        TimeLimitError: it takes too long.
        MemoryError: it takes too much memory.
    """
    # Memory outside, time inside: a timeout must not strike while the memory limit is set or reset.
    most_bytes = MOST_BYTES + MOST_BYTES_PER_CHARACTER * num_characters
    return within_bytes(lambda: within_seconds(call, LONGEST_SECONDS), most_bytes)


def endless_error(error: BaseException) -> ModelError:
    """Return the error for a template that raised one of `ENDLESS`."""
    kind = type(error).__name__
    return ModelError(
        f"the chat template recurses endlessly, nests too deeply or takes too much memory ({kind})",
        hint=OTHER_TEMPLATE,
    )


def _num_characters(messages: Messages) -> int:
    return sum(
        len(value) if isinstance(value, str) else len(str(value)) for message in messages for value in message.values()
    )
