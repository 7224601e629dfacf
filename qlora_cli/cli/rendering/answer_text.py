"""Answers on stdout: alone, below each other, or as they come. What a model writes is never taken for markup."""

import sys
from collections.abc import Sequence

from rich.text import Text

from qlora_cli.answering.answers import Answer, GenerationReport, PromptAnswers, Source, cut_note
from qlora_cli.cli.console import console, title
from qlora_cli.cli.stderr import print_line
from qlora_cli.visible import escape_controls


def to_terminal() -> bool:
    """Whether stdout is a terminal; it may be closed."""
    return sys.stdout is not None and sys.stdout.isatty()


def for_stdout(text: str) -> str:
    """Return `text` as it is for a file or a pipe, and with controls escaped for a terminal."""
    return escape_controls(text) if to_terminal() else text


def print_prompt(text: str) -> None:
    """Print a prompt as the heading of its answers."""
    title(text)


def render_answers(report: GenerationReport) -> None:
    """Print a single answer alone; several under headings, and whether those to one prompt differ."""
    if len(report.answers) == 1 and len(report.answers[0].answers) == 1:
        print(for_stdout(report.answers[0].answers[0].text), flush=True)
        return
    for place, given in enumerate(report.answers):
        if place:
            print()
        if len(report.answers) > 1:
            print_prompt(given.prompt)
        _render_prompt(given)


def verdict(answers: Sequence[Answer]) -> str:
    """Return whether answers differ, and which are alike: `the answers differ: base / adapter = merged`."""
    alike: dict[str, list[Source]] = {}
    for answer in answers:
        alike.setdefault(answer.text, []).append(answer.source)
    if len(alike) == 1:
        return "the answers are the same"
    return f"the answers differ: {' / '.join(' = '.join(sources) for sources in alike.values())}"


def _render_prompt(given: PromptAnswers) -> None:
    for answer in given.answers:
        if len(given.answers) > 1:
            title(answer.source)
        console().print(Text(answer.text), soft_wrap=True)
        print(flush=True)
    if given.differ is not None:
        console().print(Text(verdict(given.answers), style="cyan"), soft_wrap=True)


class AnswerPrinter:
    """Writes answers to stdout as they come; a heading tells several sources apart, `prompt` several prompts."""

    def __init__(self, *, is_headed: bool, max_new_tokens: int, prompt: str = "") -> None:
        self.asked_to_stop = False
        self._max_new_tokens = max_new_tokens
        self._is_headed, self._prompt = is_headed, prompt

    def begin(self, source: Source) -> None:
        """Write whose answer begins."""
        self.asked_to_stop = False
        if self._is_headed:
            title(source)

    def text(self, piece: str) -> None:
        """Write a piece of it."""
        print(for_stdout(piece), end="", flush=True)

    def stops(self) -> bool:
        """Whether the answer shall end."""
        return self.asked_to_stop

    def end(self, answer: Answer) -> None:
        """End its line, and say on stderr if it was cut off."""
        print(flush=True)
        if note := cut_note(answer, self._max_new_tokens, self._prompt):
            print_line(note)
