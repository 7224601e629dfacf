"""Write results to stdout: headings, rows of two columns, lines that are never broken inside a word."""

from collections.abc import Sequence
from textwrap import wrap
from typing import IO, Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from qlora_cli.cli.stderr import redact, sanitize
from qlora_cli.visible import escape_controls

Row = tuple[str, str]
CONTINUATION = "  "  # the indentation of a continued line
LEFT_OUT = "…"
MIN_VALUE_WIDTH = 20  # columns: in fewer, wrapped values are harder to read than broken ones


class TextConsole(Console):
    """A console that sanitizes all text and highlights nothing by itself.

    A closed pipe is an exception for the code that ends commands; rich would exit by itself, with 1.
    """

    def __init__(self, file: IO[str] | None = None) -> None:
        super().__init__(file=file, highlight=False, markup=False)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError

    def print(self, *objects: Any, **options: Any) -> None:
        """Print sanitized texts, as rich does."""
        super().print(*map(_sanitize_part, objects), **options)


def _sanitize_part(part: object) -> object:
    if isinstance(part, str):
        return sanitize(part)
    if isinstance(part, Text) and redact(part.plain) != part.plain:
        part = Text(redact(part.plain), style=part.style)
    if not isinstance(part, Text) or escape_controls(part.plain) == part.plain:
        return part
    return Text("").join(  # piece by piece, so that each keeps its style
        piece if escape_controls(piece.plain) == piece.plain else Text(escape_controls(piece.plain), style=piece.style)
        for piece in part.divide(range(1, len(part)))
    )


def console() -> Console:
    """Return a console on stdout."""
    return TextConsole()


def title(text: str) -> None:
    """Print the heading of a result."""
    console().print(Text(text, style="bold"), soft_wrap=True)


def print_rows(rows: Sequence[Row]) -> None:
    """Print names and values in two columns; on a terminal, values are wrapped at words, within their column."""
    out = console()
    width = max((len(name) for name, _ in rows), default=0)
    available = out.width - width - 4 if out.is_terminal else 0
    for name, value in rows:
        for number, line in enumerate(_wrapped(value, available)):
            label = name if number == 0 else ""
            # Whole lines into a pipe; on a terminal only a word that is too long for it continues in the next line.
            out.print(Text.assemble((f"  {label:<{width}}", "cyan"), "  ", line), soft_wrap=True)


def print_lines(lines: Sequence[str]) -> None:
    """Print lines; on a terminal, long ones are wrapped at words and indented."""
    out = console()
    for line in lines:
        indent = line[: len(line) - len(line.lstrip())]
        available = out.width - len(indent) - len(CONTINUATION) if out.is_terminal else 0
        for number, part in enumerate(_wrapped(line.strip(), available)):
            out.print(Text(f"{indent}{CONTINUATION if number else ''}{part}"), soft_wrap=True)


def shortened(name: str, width: int) -> str:
    """Return a name without its middle, because the ends of names distinguish runs."""
    if len(name) <= width:
        return name
    end = (width - len(LEFT_OUT)) // 2
    return name[: width - len(LEFT_OUT) - end] + LEFT_OUT + name[len(name) - end :]


def _wrapped(value: str, available: int) -> list[str]:
    """Return `value` in lines of at most `available` columns, unless these are too few for words."""
    if available < MIN_VALUE_WIDTH or cell_len(value) <= available:
        return [value]
    return wrap(value, available, break_long_words=False, break_on_hyphens=False)
