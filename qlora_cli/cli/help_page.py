"""The help of a command: what it is for, examples, and its flags in groups, those that everybody needs first.

Written here rather than by rich, which takes half of the time of `--help`, cuts flags in narrow windows, and draws
boxes that can't be searched.
"""

import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from qlora_cli.cli.command_examples import EXAMPLES
from qlora_cli.settings.help_groups import HelpGroup

MOST_COLUMNS, FEWEST_COLUMNS = 100, 40
NAME_COLUMNS = 26  # of flags; a longer one has a line of its own
GAP = 2
CONTINUED = "      "
OPTIONS, ARGUMENTS, COMMANDS, EXAMPLES_HEADING = "Options", "Arguments", "Commands", "Examples"
HEADINGS = [ARGUMENTS, *HelpGroup]  # in their order
SHORT_CHOICES = 14  # columns of the choices that are shown next to a flag; others are listed in its help

Row = tuple[str, str]


class HelpfulCommand(TyperCommand):
    """A command with such a help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page into `formatter`."""
        formatter.write(help_page(self, ctx))


class HelpfulGroup(TyperGroup):
    """A group of commands with such a help; the summary of a command is the first sentence of its help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page into `formatter`."""
        formatter.write(help_page(self, ctx, self.command_rows()))

    def command_rows(self) -> dict[str, list[Row]]:
        """Return names and summaries of the commands, by heading."""
        return {COMMANDS: [(name, _summary(command)) for name, command in self.commands.items()]}


def _summary(command: Any) -> str:
    return " ".join((command.help or "").split("\n\n")[0].split())


def help_page(command: Any, context: Any, commands: dict[str, list[Row]] | None = None) -> str:
    """Return the help of a command, in the width of the terminal, in colours if stdout is one."""
    columns = max(min(shutil.get_terminal_size().columns, MOST_COLUMNS), FEWEST_COLUMNS)
    page = _Page(columns, has_colours=_has_colours())
    page.usage(context.command_path, command.collect_usage_pieces(context))
    for paragraph in (command.help or "").split("\n\n"):
        page.paragraph(paragraph)
    words = context.command_path.partition(" ")[2]
    page.section(EXAMPLES_HEADING, [f"qlora {words} {example}".rstrip() for example in EXAMPLES.get(words, ())])
    page.tables(commands or {})
    page.tables(_parameters(command, context))
    page.paragraph(command.epilog or "")
    return page.text()


def _parameters(command: Any, context: Any) -> dict[str, list[Row]]:
    """Return the rows of arguments and flags by heading."""
    rows: dict[str, list[Row]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            name, text = record
            if parameter.param_type_name == "argument":
                rows.setdefault(ARGUMENTS, []).append((name.partition(" <")[0], text))  # without its type
            else:
                heading = getattr(parameter, "rich_help_panel", None) or HelpGroup.ESSENTIALS
                rows.setdefault(heading, []).append(_with_listed_choices(name, text))
    ordered = {heading: rows[heading] for heading in HEADINGS if heading in rows}
    if set(ordered) <= {ARGUMENTS, HelpGroup.ESSENTIALS}:  # no others to tell them from
        return {(OPTIONS if heading != ARGUMENTS else heading): rows for heading, rows in ordered.items()}
    return ordered


def _with_listed_choices(name: str, text: str) -> Row:
    """Return a row with many choices in its text instead of next to the flag."""
    flag, _, metavar = name.partition(" ")
    if "|" not in metavar or len(metavar) <= SHORT_CHOICES:
        return name, text
    text, bracket, default = text.partition(" [")
    return f"{flag} CHOICE", f"{text} One of {metavar.replace('|', ', ')}.{bracket}{default}"


def _has_colours() -> bool:
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class _Page:
    """The lines of a help."""

    def __init__(self, columns: int, *, has_colours: bool) -> None:
        self._columns = columns
        self._has_colours = has_colours
        self._lines: list[str] = []

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"

    def usage(self, path: str, pieces: Sequence[str]) -> None:
        first, *others = wrap(
            f"Usage: {path} {' '.join(pieces)}",
            self._columns,
            subsequent_indent=CONTINUED,
            break_long_words=False,
            break_on_hyphens=False,
        )
        self._lines += [f"{self._bold('Usage:')}{first.removeprefix('Usage:')}", *others]

    def paragraph(self, text: str) -> None:
        if text.strip():
            self._lines += ["", *wrap(" ".join(text.split()), self._columns, break_on_hyphens=False)]

    def section(self, heading: str, lines: Iterable[str]) -> None:
        if lines := list(lines):
            self._heading(heading)
            for line in lines:
                self._lines += wrap(
                    line,
                    self._columns,
                    initial_indent="  ",
                    subsequent_indent=CONTINUED,
                    break_long_words=False,
                    break_on_hyphens=False,
                )

    def tables(self, tables: Mapping[str, Sequence[Row]]) -> None:
        width = min(max((len(name) for rows in tables.values() for name, _ in rows), default=0), NAME_COLUMNS)
        for heading, rows in tables.items():
            self._heading(heading)
            for name, text in rows:
                self._lines += self._row(name, text, width)

    def _heading(self, heading: str) -> None:
        self._lines += ["", self._bold(f"{heading}:")]

    def _row(self, name: str, text: str, width: int) -> Iterator[str]:
        indent = " " * (GAP + width + GAP)
        lines = wrap(text, self._columns - len(indent), break_long_words=False, break_on_hyphens=False) or [""]
        shown = self._coloured(name)
        if len(name) > width:
            yield f"  {shown}"
        else:
            yield f"  {shown}{' ' * (width - len(name) + GAP)}{lines.pop(0)}".rstrip()
        yield from (f"{indent}{line}" for line in lines)

    def _bold(self, text: str) -> str:
        return typer.style(text, bold=True) if self._has_colours else text

    def _coloured(self, text: str) -> str:
        return typer.style(text, fg=typer.colors.CYAN) if self._has_colours else text
