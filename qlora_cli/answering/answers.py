"""Answers, with their source and speed. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from qlora_cli.units import counted

Source = Literal["base", "adapter", "merged"]
# Ended by the model; by the limit of tokens; by the user.
FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer, without special tokens.

    `num_new_tokens` counts the token that ended it, if one did; `seconds` and `tokens_per_second` include reading the
    prompt.
    """

    source: Source
    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    finish_reason: FinishReason
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class PromptAnswers:
    """A prompt and its answers, that of the base first. `differ` is None if there is only one."""

    prompt: str
    answers: tuple[Answer, ...]
    differ: bool | None


@dataclass(frozen=True, kw_only=True)
class GenerationReport:
    """The result of `qlora generate`. `adapter` and `merged` are None if there was none.

    For a run, `adapter_step` is the step of its weights, and `run_is_done` whether it was trained to its end.
    """

    model: str
    base_model: str
    adapter: Path | None
    adapter_step: int | None = None
    run_is_done: bool | None = None
    merged: Path | None
    answers: tuple[PromptAnswers, ...]
    notes: tuple[str, ...]


class Listener(Protocol):
    """Receives an answer while it is generated."""

    def begin(self, source: Source) -> None:
        """An answer begins."""

    def text(self, piece: str) -> None:
        """The answer continues with `piece`."""

    def stops(self) -> bool:
        """Return whether to end here; called after each token."""

    def end(self, answer: Answer) -> None:
        """The answer is complete."""


def collect(prompt: str, answers: list[Answer]) -> PromptAnswers:
    """Return the answers to a prompt, and whether they differ if there are several."""
    differ = len({answer.text for answer in answers}) > 1 if len(answers) > 1 else None
    return PromptAnswers(prompt=prompt, answers=tuple(answers), differ=differ)


def truncation_note(answer: Answer, max_new_tokens: int, prompt: str = "") -> str | None:
    """Return a sentence on an answer that did not end by itself, and what ended it, or None.

    `prompt` is which one it answers, `prompt 2 of 3`, where there are several.
    """
    if answer.finish_reason != "length":
        return None
    why = "--max-new-tokens" if answer.num_new_tokens >= max_new_tokens else "the model has no more positions"
    which = f"the answer ({answer.source}){f' to {prompt}' if prompt else ''}"
    return f"{which} was truncated after {counted(answer.num_new_tokens, 'token')}: {why}"


def prompt_name(number: int, num_prompts: int) -> str:
    """Return the name of a prompt, by its number from 1; empty if it is the only one."""
    return f"prompt {number} of {num_prompts}" if num_prompts > 1 else ""
