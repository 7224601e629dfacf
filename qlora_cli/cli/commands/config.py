"""`qlora config`: the resolved settings with their origins, and the schema of a settings file."""

from typing import Any

import typer

from qlora_cli.cli import options
from qlora_cli.cli.help_page import COMMANDS, HelpfulCommand, HelpfulGroup, Row
from qlora_cli.cli.json_output import print_json
from qlora_cli.cli.volume import Quiet, print_next, quiet_or_normal
from qlora_cli.errors import UsageError
from qlora_cli.settings.models import KINDS, json_schema, metadata_of
from qlora_cli.settings.setting_metadata import Command

OWN = ("quiet", "json")  # what `config show` takes itself


class ShownSettings(HelpfulCommand):
    """`qlora config show COMMAND`, which takes the setting flags of the command."""

    def __init__(self, command: Command, parameters: list[Any]) -> None:
        text = f"Print the settings of {command.value}, which are given as to the command itself."
        super().__init__(command.value, params=parameters, help=text, rich_markup_mode=None)
        self._of = command

    def invoke(self, ctx: Any) -> None:
        """Print the settings that the command uses."""
        _print(ctx, self._of)


class ShowGroup(HelpfulGroup):
    """`qlora config show`, whose subcommands are created on demand, with the flags of the real commands."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - the signature is Click's
        """Return the names of the commands that take settings."""
        return [command.value for command in Command]

    def command_rows(self) -> dict[str, list[Row]]:
        """Return names and summaries of the subcommands, without importing the real commands."""
        return {COMMANDS: [(command.value, f"The settings of {command.value}.") for command in Command]}

    def get_command(self, ctx: Any, cmd_name: str) -> ShownSettings | None:
        """Return the subcommand that shows the settings of a command; None if it takes none."""
        if cmd_name not in self.list_commands(ctx):
            return None
        own = [parameter for parameter in self.params if parameter.name in OWN]
        real = ctx.find_root().command.commands[cmd_name].params
        return ShownSettings(Command(cmd_name), [*filter(options.is_setting_parameter, real), *own])


config_app = typer.Typer(
    name="config",
    cls=HelpfulGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Show settings and where they come from.",
)
show_app = typer.Typer(name="show", cls=ShowGroup, invoke_without_command=True, rich_markup_mode=None)
config_app.add_typer(show_app)


@show_app.callback()
@options.takes(Command.TRAIN, has_volume=False)
def show(  # what it is given is read from the context
    context: typer.Context,
    quiet: Quiet = False,  # noqa: ARG001
    json: options.Json = False,  # noqa: ARG001
) -> None:
    """Print every setting, its value and where the value comes from. Takes the flags of train.

    Behind the name of a command its own flags are taken, and what it has a use for is shown.
    """
    if context.invoked_subcommand is None:
        _print(context, None)
    elif any(context.params.values()):
        command = context.invoked_subcommand
        hint = f"For example: qlora config show {command} --config FILE"
        raise UsageError(f"flags of {command} come after its name", hint=hint)


@config_app.command(cls=HelpfulCommand)
def schema() -> None:
    """Print the JSON schema of a settings file, for editors."""
    print_json(json_schema())


def _print(context: typer.Context, command: Command | None) -> None:
    """Print all settings, or those that a command uses."""
    from qlora_cli.settings.resolve import describe  # reads files: not for the help

    rows = describe(options.read_sources(context), None if command is None else KINDS[command])
    rows = [row for row in rows if command is None or _is_used_by(row[0], command)]
    if context.params["json"]:
        print_json({path: {"value": value, "origin": origin.where} for path, value, origin in rows})
        return
    from qlora_cli.cli.rendering.training_text import render_settings

    render_settings(rows)
    shown = (command or Command.TRAIN).value
    print_next([f"qlora {shown} with the same flags"], quiet_or_normal(context.params["quiet"]))


def _is_used_by(path: str, command: Command) -> bool:
    """Return whether a command takes a setting by its flag, or in a file if the setting has no flag."""
    return metadata_of(path).flag is None or metadata_of(path).is_taken_by(command)
