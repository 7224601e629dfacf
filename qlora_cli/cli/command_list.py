"""The commands, in the order of use: what `qlora --help` shows of each, and where it is, without importing it."""

from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
import typer.main

from qlora_cli.cli.help_page import HelpfulCommand
from qlora_cli.garbage import gc_disabled

BEFORE, TRAINING, AFTER, MORE = "Before training", "Training", "With what was trained", "More"
COMMANDS_PACKAGE = "qlora_cli.cli.commands"


@dataclass(frozen=True, kw_only=True)
class CommandEntry:
    """A command: its heading in the help, one line about it, and its function or group in the module of its name."""

    heading: str
    summary: str
    function: str


# A new command is one file and one entry here; its module must not import torch.
COMMANDS: Mapping[str, CommandEntry] = {
    "doctor": CommandEntry(
        heading=BEFORE, summary="Check whether this machine can train, and what to do if not.", function="doctor"
    ),
    "inspect-memory": CommandEntry(
        heading=BEFORE, summary="Predict memory and time of a run, and the GPUs it fits on.", function="inspect_memory"
    ),
    "inspect-data": CommandEntry(
        heading=BEFORE, summary="Show which tokens are trained, and what is lost or wrong.", function="inspect_data"
    ),
    "presets": CommandEntry(
        heading=BEFORE, summary="List settings for common models and cards, and their memory.", function="presets"
    ),
    "tune": CommandEntry(
        heading=TRAINING, summary="Find the learning rate of a run by short trials.", function="tune"
    ),
    "train": CommandEntry(
        heading=TRAINING, summary="Fine-tune an adapter on a base in 4 bit; resumes by itself.", function="train"
    ),
    "runs": CommandEntry(
        heading=TRAINING, summary="List runs and what became of them, or show one.", function="runs_app"
    ),
    "evaluate": CommandEntry(
        heading=AFTER, summary="Compare base, adapter and merged model on held-out rows.", function="evaluate"
    ),
    "compare": CommandEntry(
        heading=AFTER, summary="Compare runs on the same held-out rows, beyond chance.", function="compare"
    ),
    "generate": CommandEntry(heading=AFTER, summary="Answer prompts with a model or run.", function="generate"),
    "chat": CommandEntry(heading=AFTER, summary="Talk to a model or run.", function="chat"),
    "merge": CommandEntry(
        heading=AFTER, summary="Merge adapters into their base, and verify the result.", function="merge"
    ),
    "demo": CommandEntry(
        heading=MORE, summary="Try it out: a tiny bundled model, two minutes on a laptop.", function="demo"
    ),
    "load": CommandEntry(
        heading=MORE, summary="Load a model, quantized, and show what came of it; or save it.", function="load"
    ),
    "migrate": CommandEntry(
        heading=MORE, summary="Turn a file of axolotl, LLaMA-Factory or TRL into ours.", function="migrate"
    ),
    "config": CommandEntry(heading=MORE, summary="Show settings and where they come from.", function="config_app"),
}


class LazyCommands(UserDict[str, Any]):
    """The commands by name, each of which is imported when it is first asked for."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(COMMANDS))

    def __getitem__(self, name: str) -> Any:
        """Return a command.

        Raises:
            KeyError: there is none of that name.
        """
        if super().__getitem__(name) is None:
            self[name] = _command(name)
        return super().__getitem__(name)


def _command(name: str) -> Any:
    with gc_disabled():  # what modules define stays
        module = import_module(f"{COMMANDS_PACKAGE}.{name.replace('-', '_')}")
    found = getattr(module, COMMANDS[name].function)
    if isinstance(found, typer.Typer):
        return typer.main.get_group(found)
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command(name, cls=HelpfulCommand)(found)
    return typer.main.get_command(alone)
