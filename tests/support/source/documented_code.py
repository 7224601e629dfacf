"""The code blocks of our pages: where each stands, its language, and the commands in it."""

import re
import subprocess
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
FENCE = "```"


@dataclass(frozen=True)
class Block:
    """A code block of a page, without the indentation that it shares; an indented block has no language."""

    language: str
    text: str
    line: int  # of its first line, counted from 1


def blocks_of(page: Path) -> list[Block]:
    """Return the code blocks of a page, fenced or indented by four spaces, in order."""
    found: list[Block] = []
    language: str | None = None
    held: list[str] = []
    # The end of the page ends an indented block.
    for number, line in enumerate([*page.read_text(encoding="utf-8").splitlines(), ""], start=1):
        is_fence = line.lstrip().startswith(FENCE)
        is_indented = language is None and not is_fence and line.startswith("    ")
        if held and language is None and not is_indented:
            found.append(_block("", held, number))
            held = []
        if is_fence and language is None:
            language = line.strip().removeprefix(FENCE)
        elif is_fence:
            found.append(_block(language or "", held, number))
            language, held = None, []
        elif language is not None or is_indented:
            held.append(line)
    return found


def _block(language: str, lines: list[str], end: int) -> Block:
    return Block(language, textwrap.dedent("\n".join(lines)) + "\n", end - len(lines))


def code_lines(page: Path) -> Iterator[str]:
    """Yield the lines of a page's code blocks; a trailing backslash joins two."""
    for block in blocks_of(page):
        for line in re.sub(r"\\\n *", "", block.text).splitlines():
            yield line.strip()


def statements(text: str) -> Iterator[str]:
    """Yield what bash takes as one statement, such as a line, lines joined by backslashes, or all lines of an `if`."""
    held = ""
    for line in text.splitlines(keepends=True):
        held += line
        if not held.strip() or held.lstrip().startswith("#"):
            held = ""
        elif not held.endswith("\\\n") and _is_complete(held):
            yield held
            held = ""


def _is_complete(text: str) -> bool:
    return subprocess.run(["/bin/bash", "-n", "-c", text], check=False, capture_output=True).returncode == 0
