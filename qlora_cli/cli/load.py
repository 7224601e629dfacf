"""`qlora load MODEL`: quantize on loading, and say what came of it."""

import typer

from qlora_cli.cli import options
from qlora_cli.cli.output import print_json
from qlora_cli.settings.models import LoadSettings


@options.takes("model", "quantization", positional="model.name")
def load(context: typer.Context, json: options.Json = False) -> None:
    """Load a model in 4 bit and show what was loaded: parameters, bytes by kind, dtype, time, peaks."""
    resolved = options.resolve_settings(context, LoadSettings)

    from qlora_cli.cli.progress import reporting  # rich, and below torch: only once the settings are right
    from qlora_cli.cli.render import render_load
    from qlora_cli.loading.source import check_model_name

    if problem := check_model_name(resolved.settings.model):
        raise problem
    with reporting() as reporter:
        from qlora_cli.loading.loader import load_model

        report = load_model(resolved.settings, reporter).report()
    print_json(report) if json else render_load(report)
