"""How much a command says on stderr: `--quiet`, or `--verbose`, and what comes next at its end."""

from collections.abc import Sequence
from enum import StrEnum
from shlex import quote
from typing import Annotated, Any

import typer

from qlora_cli.cli.stderr import print_line
from qlora_cli.errors import UsageError
from qlora_cli.settings.help_groups import HelpGroup


class Volume(StrEnum):
    """How much a command says: warnings and errors only, progress and notes, or everything, line by line."""

    QUIET = "quiet"
    NORMAL = "normal"
    VERBOSE = "verbose"


Quiet = Annotated[
    bool,
    typer.Option("--quiet", help="Only warnings, errors and the result.", rich_help_panel=HelpGroup.OUTPUT),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        help="Progress in lines, one for every step; all figures of a merge.",
        rich_help_panel=HelpGroup.OUTPUT,
    ),
]


def volume_of(context: Any) -> Volume:
    """Return how much the running command says.

    Raises:
        UsageError: both flags are given.
    """
    given = [volume for volume in Volume if context.params.get(volume.value)]
    if len(given) > 1:
        raise UsageError("both --quiet and --verbose are given, which are opposites", hint="Leave one of them out.")
    return given[0] if given else Volume.NORMAL


def quiet_or_normal(quiet: bool) -> Volume:
    """Return how much a command says that has `--quiet` only."""
    return Volume.QUIET if quiet else Volume.NORMAL


def print_next(steps: Sequence[str], volume: Volume = Volume.NORMAL, *, as_json: bool = False) -> None:
    """Say what comes next, in one line: nothing if only the result is asked for."""
    if steps and volume != Volume.QUIET and not as_json:
        print_line(f"next: {'; '.join(steps)}")


def command(*words: object) -> str:
    """Return a command of ours, with names that a shell reads as they are."""
    return " ".join(["qlora", *(quote(str(word)) for word in words)])
