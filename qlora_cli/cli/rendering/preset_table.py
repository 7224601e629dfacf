"""The table of `qlora presets`."""

from collections.abc import Sequence

from rich.table import Table

from qlora_cli.cli.console import console
from qlora_cli.settings.preset_files import Preset
from qlora_cli.units import format_bytes


def render_presets(presets: Sequence[Preset]) -> None:
    """Print a line for each preset."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("preset", no_wrap=True)
    table.add_column("model", overflow="fold")
    for heading in ("card", "tokens a row", "needs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in presets:
        most = format_bytes(one.predicted_bytes)
        table.add_row(one.name, one.model, f"{one.card_gb} GB", f"{one.max_length_tokens:,}", most)
    console().print(table)
