"""`qlora load MODEL`: quantize a model on loading, and report the result."""

import dataclasses
import time

import typer

from qlora_cli.cli import options
from qlora_cli.cli.json_output import print_json
from qlora_cli.cli.volume import command, print_next, volume_of
from qlora_cli.settings.error_collector import ErrorCollector
from qlora_cli.settings.models import LoadCommandSettings
from qlora_cli.settings.setting_metadata import Command


@options.takes(Command.LOAD)
def load(context: typer.Context, json: options.Json = False) -> None:
    """Load a model, quantized to 4 bit by default, and show what came of it: parameters, bytes, dtype, time, peaks."""
    resolved = options.resolve_settings(context, LoadCommandSettings)
    save, error = resolved.settings.load.save, resolved.settings.load.error

    from qlora_cli.cli.progress.reporters import reporting  # rich, and below torch: only once the settings are right
    from qlora_cli.cli.rendering.load_text import render_load
    from qlora_cli.model_files.given_model import check_model_name
    from qlora_cli.runs.directory import check_free_directory

    errors = ErrorCollector(resolved.where_of)
    if problem := check_model_name(resolved.settings.model):
        errors.add("model.name", problem.for_setting("model.name"))
    if save is not None and (problem := check_free_directory(save, "--save")):
        errors.add("load.save", problem.for_setting("load.save"))
    errors.raise_collected()
    with reporting(volume_of(context)) as reporter:
        from qlora_cli.loading.load_plan import plan_load
        from qlora_cli.loading.loader import load_planned
        from qlora_cli.loading.save import check_savable, save_quantized

        start = time.monotonic()
        load_plan = plan_load(resolved, reporter)
        if save is not None:
            check_savable(load_plan, save)
        loaded = load_planned(load_plan, reporter, measure_error=error, started=start)
        report = loaded.report()
        if save is not None:
            num_bytes = save_quantized(loaded, save, reporter)
            report = dataclasses.replace(report, saved=save, saved_bytes=num_bytes)
    print_json(report) if json else render_load(report)
    print_next([command("inspect-memory", resolved.settings.model.name)], volume_of(context), as_json=json)
