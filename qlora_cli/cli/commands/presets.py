"""`qlora presets`: settings for common models and cards, with the memory that each is predicted to take."""

from typing import Annotated

import typer

from qlora_cli.cli import options
from qlora_cli.cli.completion import complete_preset
from qlora_cli.cli.json_output import print_json
from qlora_cli.cli.volume import Quiet, print_next, quiet_or_normal
from qlora_cli.settings.files.preset_files import preset_file
from qlora_cli.settings.files.preset_files import presets as all_presets

AFTER_PRESETS = ("qlora train --preset NAME --dataset FILE --output DIRECTORY",)
AFTER_PRESET = ("save and edit it, then qlora train --config FILE --dataset DATA --output DIRECTORY",)


def presets(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="Preset whose settings are printed as a file to edit, for --config.",
            show_default=False,
            autocompletion=complete_preset,
        ),
    ] = None,
    quiet: Quiet = False,
    json: options.Json = False,
) -> None:
    """List the presets of train: model, card, the longest rows that fit, and the memory needed as predicted.

    With NAME, print the settings of that preset, to be written to a file and edited.
    """
    text = None if name is None else preset_file(name).read_text(encoding="utf-8")
    if json:
        print_json({"presets": [one for one in all_presets() if name in (None, one.name)], "settings": text})
        return
    if text is not None:
        from qlora_cli.cli.console import console  # rich: not for the help

        console().print(text, soft_wrap=True, end="")
        print_next(AFTER_PRESET, quiet_or_normal(quiet))
        return
    from qlora_cli.cli.rendering.preset_table import render_presets  # rich: not for the help

    render_presets(all_presets())
    print_next(AFTER_PRESETS, quiet_or_normal(quiet))
