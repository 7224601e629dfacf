"""`qlora load MODEL`: quantize a model on loading, and report the result."""

import dataclasses
import time
from typing import TYPE_CHECKING

import typer

from qlora_cli.cli import options
from qlora_cli.cli.json_output import print_json
from qlora_cli.cli.volume import command, print_next, volume_of
from qlora_cli.cli.without_compiler import leave_out_compiler
from qlora_cli.settings.models import LoadCommandSettings, SavingSettings
from qlora_cli.settings.setting_metadata import Command

if TYPE_CHECKING:
    from qlora_cli.events import Reporter
    from qlora_cli.loading.load_plan import LoadPlan
    from qlora_cli.loading.loader import LoadedModel
    from qlora_cli.quantization.load_report import LoadReport
    from qlora_cli.settings.resolve import Resolved


@options.takes(Command.LOAD)
def load(context: typer.Context, json: options.Json = False) -> None:
    """Load a model, quantized to 4 bit by default, and show what came of it: parameters, bytes, dtype, time, peaks."""
    resolved = options.resolve_settings(context, LoadCommandSettings)
    given = resolved.settings.load

    from qlora_cli.cli.progress.reporters import reporting  # rich: only once the input is right
    from qlora_cli.cli.rendering.load_text import render_load
    from qlora_cli.data.finding.sources import check_dataset_name
    from qlora_cli.model_files.given_model import check_model_name
    from qlora_cli.runs.directory import check_free_directory
    from qlora_cli.settings.error_collector import ErrorCollector

    errors = ErrorCollector(resolved.where_of)
    if problem := check_model_name(resolved.settings.model):
        errors.add("model.name", problem.for_setting("model.name"))
    if given.save is not None and (problem := check_free_directory(given.save, "--save")):
        errors.add("load.save", problem.for_setting("load.save"))
    for path, names in (("load.calibrate", given.calibrate), ("load.error_on", given.error_on)):
        for wrong in filter(None, map(check_dataset_name, names or ())):
            errors.add(path, wrong.for_setting(path))
    errors.raise_collected()
    leave_out_compiler(resolved.settings.model.attention)
    with reporting(volume_of(context)) as reporter:
        report = _load(resolved, reporter)
    print_json(report) if json else render_load(report)
    model = resolved.settings.model.name if given.save is None else str(given.save)
    print_next([command("inspect-memory", model)], volume_of(context), as_json=json)


def _load(resolved: "Resolved[LoadCommandSettings]", reporter: "Reporter") -> "LoadReport":
    from qlora_cli.cli.progress.reporters import importing

    with importing(reporter):
        from qlora_cli.loading.load_plan import plan_load
        from qlora_cli.loading.loader import load_planned
        from qlora_cli.loading.save import check_savable, save_quantized

    given, start = resolved.settings.load, time.monotonic()
    load_plan = plan_load(resolved, reporter)
    if given.save is not None:
        check_savable(load_plan, given.save)
    if given.error_on is not None:
        from qlora_cli.calibrating.prediction_error import check_comparable

        check_comparable(load_plan, "load.error_on")
    if given.memory_budget is not None:
        from qlora_cli.calibrating.precision_budget import check_budget

        check_budget(given.memory_budget, load_plan)
    calibrated = None
    if given.calibrate is not None:
        from qlora_cli.calibrating.calibration import calibrate_on

        calibrated = calibrate_on(given.calibrate, load_plan, reporter, num_tokens=given.calibration_tokens)
    loaded = load_planned(load_plan, reporter, measure_error=given.error, calibrated=calibrated, started=start)
    report = loaded.report()
    if given.error_on is not None:
        loaded, report = _compared(loaded, load_plan, given, reporter)
    if given.save is not None:
        num_bytes = save_quantized(loaded, given.save, reporter)
        report = dataclasses.replace(report, saved=given.save, saved_bytes=num_bytes)
    return report


def _compared(
    loaded: "LoadedModel", load_plan: "LoadPlan", given: SavingSettings, reporter: "Reporter"
) -> tuple["LoadedModel", "LoadReport"]:
    """Return the model, with as many layers in 16 bit as a budget allows, and the report with its error on text."""
    from qlora_cli.calibrating.precision_budget import keep_precision
    from qlora_cli.calibrating.prediction_error import measure_prediction_error, predict_unquantized

    assert given.error_on is not None
    budget_bytes, kept = given.memory_budget, None
    if budget_bytes is None:
        exact = predict_unquantized(load_plan, given.error_on, reporter)
    else:
        both = predict_unquantized(load_plan, given.error_on, reporter, num_halves=2)
        chosen_by, exact = both.halves()  # what was chosen is measured on other rows
        loaded, kept = keep_precision(loaded, load_plan, chosen_by, budget_bytes, reporter)
    error = measure_prediction_error(loaded, exact)
    return loaded, dataclasses.replace(loaded.report(), prediction_error=error, kept=kept)
