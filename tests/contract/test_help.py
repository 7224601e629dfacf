"""The help of every command: in the width of the window, flags in groups, and before anything heavy is imported."""

import os
import pkgutil
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from qlora_cli.cli import commands as command_modules
from qlora_cli.cli.app import app
from qlora_cli.cli.command_examples import EXAMPLES
from qlora_cli.cli.command_list import COMMANDS
from qlora_cli.cli.progress.reporters import IMPORTING
from qlora_cli.settings.help_groups import HelpGroup
from tests.support.processes.forks import end_of, start_on_terminal
from tests.support.processes.light_commands import LightQlora

COLUMNS = 80
PARTS_OF_COMMANDS = {"memory_request", "predicted_data"}  # imported when the command runs
LONGEST_WORD = re.compile(r"\s*\S+")  # what can't be broken: a flag with its name for a value, a path
FLAG = re.compile(r"^  (?:-\w, )?(--[a-z][a-z-]*)", re.MULTILINE)


def commands() -> Iterator[str]:
    """Yield every command and group, as it is typed after `qlora`."""

    def below(group: Any, words: tuple[str, ...]) -> Iterator[str]:
        yield " ".join(words)
        for name, command in getattr(group, "commands", {}).items():
            yield from below(command, (*words, name))

    return below(typer.main.get_command(app), ())


ALL = list(commands())


def help_of(command: str, columns: int = COLUMNS) -> str:
    done = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": str(columns)})
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("command", ALL)
def test_help_fits_the_window_and_no_word_is_cut(command: str) -> None:
    for columns in (COLUMNS, 60, 200):
        shown = help_of(command, columns)
        too_long = [line for line in shown.splitlines() if len(line) > min(columns, 100)]
        assert [line for line in too_long if not LONGEST_WORD.fullmatch(line)] == []
        assert "..." not in shown.partition("\n\n")[2]  # the usage has them, for what may be repeated
        assert "…" not in shown
        assert "\x1b" not in shown
    assert help_of(command).split() == help_of(command, 60).split()


def test_commands_are_listed_in_the_order_of_use_under_their_headings() -> None:
    shown = help_of("")
    positions = [shown.index(f"\n  {name} ") for name in COMMANDS]
    assert positions == sorted(positions)
    names = list(COMMANDS)
    assert names[:12] == [
        *("doctor", "inspect-memory", "inspect-data", "presets", "tune", "train", "runs", "evaluate", "compare"),
        *("generate", "chat", "merge"),
    ]
    headings = list(dict.fromkeys(entry.heading for entry in COMMANDS.values()))
    assert [line[:-1] for line in shown.splitlines() if line[:-1] in headings] == headings
    for entry in COMMANDS.values():
        assert entry.summary in shown  # on one line


def test_groups_of_flags_come_in_one_order_and_what_is_needed_first() -> None:
    shown = help_of("train")
    groups = [line[:-1] for line in shown.splitlines() if line.removesuffix(":") in list(HelpGroup)]
    assert groups == list(HelpGroup)
    first = FLAG.findall(shown.partition("Essentials:")[2].partition("\n\n")[0])
    assert first[:3] == ["--model", "--dataset", "--output"]
    assert len(first) <= 15


@pytest.mark.parametrize("command", ALL)
def test_every_flag_is_in_the_help_exactly_once(command: str) -> None:
    found: Any = typer.main.get_command(app)
    for word in command.split():
        found = found.commands[word]
    flags = [max(parameter.opts, key=len) for parameter in found.params if parameter.param_type_name == "option"]
    shown = FLAG.findall(help_of(command))
    assert sorted(shown) == sorted([*flags, "--help"])


def test_every_command_has_examples_that_are_in_its_help() -> None:
    groups = {"", "runs", "config"}
    assert set(EXAMPLES) == set(commands()) - groups
    for command, examples in EXAMPLES.items():
        words = " ".join(help_of(command).split())
        for example in examples:
            assert f"qlora {command} {example}".strip() in words


def test_help_imports_no_command_and_nothing_heavy(light_qlora: LightQlora) -> None:
    assert light_qlora("--help").heavy == []
    assert light_qlora("train", "--help").heavy == []


@pytest.mark.parametrize(
    "given",
    [
        "train --model MODEL --dataset ROWS --output run",
        "tune --model MODEL --dataset ROWS --output tuned",
        "load MODEL",
        "evaluate MODEL --dataset ROWS",
        "generate MODEL --prompt Hello",
    ],
)
def test_imports_that_take_seconds_are_announced(
    light_qlora: LightQlora, base_model: Path, rows: Path, tmp_path: Path, given: str
) -> None:
    arguments = given.replace("MODEL", str(base_model)).replace("ROWS", str(rows)).split()
    ended = light_qlora(*arguments, directory=tmp_path, blocked=["torch"])
    assert ended.stderr.partition("\n")[0] == f"{IMPORTING.title} …"
    assert "torch is blocked" in ended.stderr


def test_choices_that_are_too_long_for_a_column_are_listed_in_the_text() -> None:
    words = " ".join(help_of("train").split())
    assert "--optimizer CHOICE Optimizer of the adapter. One of adamw_torch, adamw_torch_fused, " in words
    assert "--device auto|cpu|cuda" in words


@pytest.mark.parametrize(
    ("term", "no_color", "expected"), [("xterm", "", True), ("xterm", "1", False), ("dumb", "", False)]
)
def test_help_is_in_colours_on_a_terminal_that_wants_them(term: str, no_color: str, expected: bool) -> None:
    terminal, its_end = pty.openpty()
    environment = {**os.environ, "TERM": term, "NO_COLOR": no_color}
    process = start_on_terminal(["doctor", "--help"], environment, os.ttyname(its_end))
    shown = ""
    assert end_of(process, seconds=60) == 0
    os.set_blocking(terminal, False)
    while True:
        try:
            part = os.read(terminal, 65536)
        except (BlockingIOError, OSError):
            break
        if not part:
            break
        shown += part.decode()
    os.close(its_end)
    os.close(terminal)
    assert "Usage:" in shown
    assert ("\x1b[" in shown) == expected


def test_the_help_of_a_command_imports_neither_readers_of_files_nor_the_catalogue() -> None:
    """They take up to half of its time; a command imports them when it runs."""
    modules = ", ".join(
        f"qlora_cli.cli.commands.{module.name}"
        for module in pkgutil.iter_modules(command_modules.__path__)
        if module.name not in PARTS_OF_COMMANDS
    )
    unneeded = {
        "yaml",
        "numpy",
        "psutil",
        "filelock",
        "qlora_cli.events",
        "qlora_cli.memory.gpus",
        "qlora_cli.settings.resolve",
    }
    code = f"import sys, {modules}; print(sorted({unneeded} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
