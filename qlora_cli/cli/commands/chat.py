"""`qlora chat MODEL`: a conversation on the terminal, or from a pipe, line by line."""

import importlib
import importlib.util
import json
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer

from qlora_cli.cli import options
from qlora_cli.cli.commands.generate import check_request
from qlora_cli.cli.stderr import print_line
from qlora_cli.cli.volume import print_next, volume_of
from qlora_cli.cli.without_compiler import leave_out_compiler
from qlora_cli.errors import QloraError, UsageError
from qlora_cli.settings.models import ChatSettings
from qlora_cli.settings.setting_metadata import Command

if TYPE_CHECKING:
    from qlora_cli.answering.answers import Answer
    from qlora_cli.answering.conversation import Chat
    from qlora_cli.answering.open_model import OpenModel
    from qlora_cli.cli.rendering.answer_text import AnswerPrinter

MARK = "> "
COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?")
SHORT_HELP = "/help lists the commands; /exit or Ctrl-D ends"
HELP = {
    "/help": "lists the commands",
    "/reset": "starts over; the system prompt stays",
    "/undo": "takes the last question and its answer back",
    "/system TEXT": "sets the system prompt, from here on; without TEXT there is none",
    "/save FILE": "adds the conversation to a .jsonl file, as a row to train on",
    "/exit, /quit": "end the chat, as Ctrl-D does; Ctrl-C stops an answer",
}


@options.takes(Command.CHAT)
def chat(context: typer.Context) -> None:
    """Talk to a model, an adapter or a run, with its chat template. Reads lines from a pipe, too.

    /help lists what else can be typed: /reset, /undo, /system TEXT, /save FILE, /exit. Ctrl-C stops an answer.
    """
    resolved = options.resolve_settings(context, ChatSettings)
    settings, volume = resolved.settings, volume_of(context)
    if sys.stdin is None:
        raise UsageError("a chat reads stdin, which is closed", hint="Use qlora generate.")
    check_request(resolved)

    from qlora_cli.cli.progress.reporters import importing, reporting  # rich: only once the input is right
    from qlora_cli.cli.rendering.next_steps import after_chat

    leave_out_compiler(settings.model.attention)
    with reporting(volume) as reporter:
        with importing(reporter):
            from qlora_cli.answering.conversation import Chat
            from qlora_cli.answering.open_model import open_model

        opened = open_model(resolved, settings.generate, reporter, is_chat=True)
    _converse(opened, Chat(opened, settings.generate), settings.generate.max_new_tokens)
    print_next(after_chat(settings.model.name), volume)


def _converse(opened: "OpenModel", chat: "Chat", max_new_tokens: int) -> None:
    from qlora_cli.cli.rendering.answer_text import AnswerPrinter

    printer = AnswerPrinter(is_headed=len(opened.sources) > 1, max_new_tokens=max_new_tokens)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print_line(SHORT_HELP)
    for line in _typed_lines() if is_terminal else _piped_lines():
        command = COMMAND.fullmatch(line)
        if command is not None and command[1] in ("quit", "exit"):
            return
        try:
            if command is not None:
                _run_command(chat, command[1], command[2])
            elif line.strip():
                with _stopped_by_ctrl_c(printer) if is_terminal else nullcontext():
                    _note_interrupted(chat.ask(line.strip(), printer)[-1])
        except QloraError as error:  # concerns this turn only: the conversation is unchanged
            print_line(f"error: {error.message}")
            print_line(f"  hint: {error.hint}")


def _run_command(chat: "Chat", command: str, text: str | None) -> None:
    """Run a command, a line that begins with a slash.

    Raises:
        UsageError: there is no such command, or the file can't be written.
        ModelError: the chat template does not write the system prompt.
    """
    if command == "help":
        for name, text_of_help in HELP.items():
            print_line(f"  {name:<12}  {text_of_help}")
    elif command == "undo":
        question = chat.undo()
        print_line("there is nothing to take back" if question is None else f"taken back: {question}")
    elif command == "save":
        _save(chat, text)
    elif command == "reset":
        chat.reset()
        print_line("the conversation starts over")
    elif command == "system":
        chat.set_system(text or None)
        print_line("the system prompt holds from here on" if text else "no system prompt from here on")
    else:
        raise UsageError(f"no command /{command}", hint=f"{SHORT_HELP}. What begins with a space is sent as it is.")


def _save(chat: "Chat", name: str | None) -> None:
    """Append the conversation to a file as a row of messages.

    Raises:
        UsageError: none is named, or it can't be written.
    """
    if not name:
        raise UsageError("/save needs the name of a file", hint="Such as /save chat.jsonl")
    path = Path(name).expanduser()
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": chat.messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}", hint="Name another file.") from error
    print_line(f"the conversation is a row of {path}")


def _note_interrupted(answer: "Answer") -> None:
    if answer.finish_reason == "interrupted":
        print_line("stopped; the answer so far stays in the conversation")


def _typed_lines() -> Iterator[str]:
    """Yield lines of a terminal until Ctrl-D; Ctrl-C ends the command."""
    if importlib.util.find_spec("readline") is not None:  # not on every system
        importlib.import_module("readline")  # lets `input` edit lines, with a history
    while True:
        if not sys.stdout.isatty():  # `input` would write the mark there
            print(MARK, end="", file=sys.stderr, flush=True)
        try:
            yield _decodable(input(MARK if sys.stdout.isatty() else ""))
        except EOFError:
            print_line("")
            return
        except KeyboardInterrupt:
            print_line("")
            raise
        except UnicodeError:
            print_line("error: the line is not UTF-8")


def _piped_lines() -> Iterator[str]:
    try:
        for line in sys.stdin:
            yield _decodable(line.rstrip("\n"))
    except UnicodeError as error:
        raise UsageError("stdin is not UTF-8", hint="Save it as UTF-8.") from error


def _decodable(line: str) -> str:
    line.encode()  # in some locales, Python reads invalid bytes as lone surrogates
    return line


@contextmanager
def _stopped_by_ctrl_c(printer: "AnswerPrinter") -> Iterator[None]:
    """Make Ctrl-C stop the answer after the token in progress; a second one ends the command as usual."""

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature is Python's
        if printer.asked_to_stop:
            raise KeyboardInterrupt
        printer.asked_to_stop = True

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
