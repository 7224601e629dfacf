"""`qlora config`: the resolved settings with their origins, and the schema of a settings file."""

import typer

from qlora_cli.cli import options
from qlora_cli.cli.output import print_json
from qlora_cli.settings.marks import Command
from qlora_cli.settings.models import TrainSettings, json_schema
from qlora_cli.settings.resolve import describe

config_app = typer.Typer(
    name="config", no_args_is_help=True, rich_markup_mode=None, help="Show settings and where they come from."
)


@config_app.command()
@options.takes(Command.TRAIN, TrainSettings)
def show(context: typer.Context, json: options.Json = False) -> None:
    """Print every setting, its value and where the value comes from. Takes the flags of train."""
    rows = describe(options.read_sources(context))
    if json:
        print_json({path: {"value": value, "origin": origin.where} for path, value, origin in rows})
        return
    from qlora_cli.cli.render import render_settings

    render_settings(rows)


@config_app.command()
def schema() -> None:
    """Print the JSON schema of a settings file, for editors."""
    print_json(json_schema())
