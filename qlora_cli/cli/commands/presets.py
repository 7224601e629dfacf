"""`qlora presets`: settings for common models and cards, with the memory that each is predicted to take."""

from qlora_cli.cli import options
from qlora_cli.cli.json_output import print_json
from qlora_cli.cli.volume import Quiet, print_next, quiet_or_normal
from qlora_cli.settings.files.preset_files import presets as all_presets

AFTER_PRESETS = ("qlora train --preset NAME --dataset FILE --output DIRECTORY",)


def presets(quiet: Quiet = False, json: options.Json = False) -> None:
    """List the presets of train: model, card, the longest rows that fit, and the memory needed as predicted."""
    if json:
        print_json({"presets": all_presets()})
        return
    from qlora_cli.cli.rendering.preset_table import render_presets  # rich: not for the help

    render_presets(all_presets())
    print_next(AFTER_PRESETS, quiet_or_normal(quiet))
