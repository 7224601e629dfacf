"""Print answers on stdout: a single one, several, or as they are generated. Markup in them has no effect."""

import sys
from collections.abc import Sequence

from rich.text import Text

from qlora_cli.answering.answers import Answer, GenerationReport, PromptAnswers, Source, truncation_note
from qlora_cli.cli.console import console, title
from qlora_cli.cli.stderr import print_line
from qlora_cli.visible import escape_controls


def to_terminal() -> bool:
    """Return whether stdout is a terminal; it may be closed."""
    return sys.stdout is not None and sys.stdout.isatty()


def for_stdout(text: str) -> str:
    """Return `text` unchanged for a file or a pipe, and with control characters escaped for a terminal."""
    return escape_controls(text) if to_terminal() else text


def print_prompt(text: str) -> None:
    """Print a prompt as the heading of its answers."""
    title(text)


def render_answers(report: GenerationReport) -> None:
    """Print a single answer without a heading; several with headings, and whether those to one prompt differ."""
    if len(report.answers) == 1 and len(report.answers[0].answers) == 1:
        print(for_stdout(report.answers[0].answers[0].text), flush=True)
        return
    for index, prompt_answers in enumerate(report.answers):
        if index:
            print()
        if len(report.answers) > 1:
            print_prompt(prompt_answers.prompt)
        _render_prompt(prompt_answers)


def verdict(answers: Sequence[Answer]) -> str:
    """Return whether answers differ, and which are equal: `the answers differ: base / adapter = merged`."""
    by_text: dict[str, list[Source]] = {}
    for answer in answers:
        by_text.setdefault(answer.text, []).append(answer.source)
    if len(by_text) == 1:
        return "the answers are the same"
    return f"the answers differ: {' / '.join(' = '.join(sources) for sources in by_text.values())}"


def _render_prompt(prompt_answers: PromptAnswers) -> None:
    for answer in prompt_answers.answers:
        if len(prompt_answers.answers) > 1:
            title(answer.source)
        console().print(Text(answer.text), soft_wrap=True)
        print(flush=True)
    if prompt_answers.differ is not None:
        console().print(Text(verdict(prompt_answers.answers), style="cyan"), soft_wrap=True)


class AnswerPrinter:
    """Writes answers to stdout as they are generated; headings distinguish sources, `prompt` distinguishes prompts."""

    def __init__(self, *, is_headed: bool, max_new_tokens: int, prompt: str = "") -> None:
        self.asked_to_stop = False
        self._max_new_tokens = max_new_tokens
        self._is_headed, self._prompt = is_headed, prompt

    def begin(self, source: Source) -> None:
        """Write the source of the answer that begins."""
        self.asked_to_stop = False
        if self._is_headed:
            title(source)

    def text(self, piece: str) -> None:
        """Write a piece of the answer."""
        print(for_stdout(piece), end="", flush=True)

    def stops(self) -> bool:
        """Return whether the answer should stop."""
        return self.asked_to_stop

    def end(self, answer: Answer) -> None:
        """End the line, and report on stderr if the answer was truncated."""
        print(flush=True)
        if note := truncation_note(answer, self._max_new_tokens, self._prompt):
            print_line(note)
