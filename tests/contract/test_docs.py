"""The documentation: commands parse, links lead somewhere, the generated page is fresh."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from qlora_cli.cli.app import app

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = sorted(
    {
        line.strip().split(" > ")[0]
        for page in PAGES
        for line in page.read_text(encoding="utf-8").splitlines()
        if re.match(r"\s*qlora \w", line)
    }
)


def parse(command: Any, arguments: list[str], context: Any = None) -> None:
    """Parse `arguments` down to the last subcommand, running nothing; a wrong flag raises."""
    made = command.make_context(command.name, list(arguments), parent=context)
    if getattr(command, "commands", None):
        rest = [*made._protected_args, *made.args]
        _, subcommand, remaining = command.resolve_command(made, rest)
        parse(subcommand, remaining, made)


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("line", COMMANDS)
def test_every_documented_command_parses(line: str) -> None:
    parse(typer.main.get_command(app), shlex.split(line)[1:])


def test_local_links_lead_somewhere() -> None:
    links = 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                links += 1
                assert (page.parent / target).exists(), f"{page}: {target}"
    assert links >= 10


def test_the_settings_page_is_fresh() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from make_reference import PAGE, settings_page
    finally:
        sys.path.pop(0)
    assert PAGE.read_text(encoding="utf-8") == settings_page(), "run: make reference"
