"""How results are written to stdout: headings, rows of two columns, whole lines whatever the width."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

Row = tuple[str, str]


class _PipeConsole(Console):
    """Leaves a closed pipe to the one place that ends commands; rich would exit by itself, with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console() -> Console:
    """Return a console on stdout that colours nothing by guessing."""
    return _PipeConsole(highlight=False)


def title(text: str) -> None:
    """Print the heading of a result."""
    console().print(Text(text, style="bold"), soft_wrap=True)


def print_rows(rows: Sequence[Row]) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        line = Text.assemble((f"  {name:<{width}}", "cyan"), "  ", value)
        console().print(line, soft_wrap=True)  # whole lines, also into a pipe
