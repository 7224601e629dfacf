"""The root command: it finds commands when they are needed, and handles all that goes wrong in them."""

from typing import Any

from qlora_cli.cli.command_list import COMMANDS, LazyCommands
from qlora_cli.cli.failures import failures_as_messages
from qlora_cli.cli.help_page import HelpfulGroup, Row


class RootGroup(HelpfulGroup):
    """The root command, which handles all exceptions of its subcommands, also under `CliRunner`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.commands = LazyCommands()

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - the signature is Click's
        """Return the names of the commands, in the order of use."""
        return list(COMMANDS)

    def command_rows(self) -> dict[str, list[Row]]:
        """Return names and summaries of the commands by heading, without importing the commands."""
        rows: dict[str, list[Row]] = {}
        for name, entry in COMMANDS.items():
            rows.setdefault(entry.heading, []).append((name, entry.summary))
        return rows

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of the root."""
        with failures_as_messages(args, ctx.meta):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Parse and run the subcommand."""
        with failures_as_messages([*ctx._protected_args, *ctx.args], ctx.meta):
            return super().invoke(ctx)
