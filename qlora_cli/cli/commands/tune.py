"""`qlora tune`: find the learning rate of a run by short trials, judged on held-out rows."""

from typing import Annotated

import typer

from qlora_cli.cli import options
from qlora_cli.cli.json_output import print_json
from qlora_cli.cli.parsing.learning_rates import read_learning_rates
from qlora_cli.cli.volume import print_next, volume_of
from qlora_cli.cli.without_compiler import leave_out_compiler
from qlora_cli.settings.help_groups import HelpGroup
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.setting_metadata import Command

Rates = Annotated[
    str | None,
    typer.Option(
        "--learning-rates",
        metavar="NUMBERS",
        help="Rates to try, separated by commas; by default six around --learning-rate, and more if the best is at "
        "their edge.",
        show_default=False,
        rich_help_panel=HelpGroup.ESSENTIALS,
    ),
]
TrialSteps = Annotated[
    int | None,
    typer.Option(
        "--trial-steps",
        metavar="INTEGER",
        min=1,
        help="Steps of the longest trials; by default a quarter of the run, from 16 to 128.",
        show_default=False,
        rich_help_panel=HelpGroup.ESSENTIALS,
    ),
]


@options.takes(Command.TRAIN)
def tune(
    context: typer.Context,
    learning_rates: Rates = None,
    trial_steps: TrialSteps = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would cost, before any weight is read.")
    ] = False,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Find the learning rate of a run, by short trials from the same adapter over the same first rows.

    Each trial is measured on held-out rows. Rates that are clearly worse, or diverge, are dropped after the shortest
    trials; the others go on with longer ones. Takes the flags of qlora train, and writes a settings file for it.
    """
    volume = volume_of(context)
    resolved = options.resolve_settings(context, TrainSettings)
    rates = None if learning_rates is None else read_learning_rates(learning_rates)

    from qlora_cli.events import SilentReporter
    from qlora_cli.training.checks.input_checks import check_train_inputs  # readers of data: not for the help
    from qlora_cli.tuning.trial_steps import TuneRequest
    from qlora_cli.tuning.tuning_checks import check_tune, run_of_trials

    check_tune(resolved)
    check_train_inputs(run_of_trials(resolved, SilentReporter()))
    request = TuneRequest(learning_rates=rates, trial_steps=trial_steps)

    from qlora_cli.cli.progress.reporters import importing, reporting  # rich: only once the input is right
    from qlora_cli.cli.rendering.next_steps import AFTER_PLAN, after_tuning
    from qlora_cli.cli.rendering.tuning_text import render_tune_plan, render_tuning
    from qlora_cli.cli.termination import signals_as_errors

    leave_out_compiler(resolved.settings.model.attention, compiles_layers=resolved.settings.training.torch_compile)
    if dry_run:
        with reporting(volume) as reporter:
            with importing(reporter):
                from qlora_cli.tuning import tuning_run

            plan = tuning_run.plan(resolved, request, reporter, force=force)
        print_json(plan) if json else render_tune_plan(plan)
        print_next(AFTER_PLAN, volume, as_json=json)
        return
    with reporting(volume) as reporter, signals_as_errors("goes on after the trials that are done"):
        with importing(reporter):
            from qlora_cli.tuning import tuning_run

        result = tuning_run.tune(resolved, request, reporter, force=force)
    print_json(result) if json else render_tuning(result)
    print_next(after_tuning(result), volume, as_json=json)
