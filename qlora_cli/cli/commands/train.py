"""`qlora train`: fine-tune a LoRA adapter on a quantized base."""

import signal
import sys
from typing import Annotated

import typer

from qlora_cli.cli import options
from qlora_cli.cli.json_output import print_json
from qlora_cli.cli.robust_stream import ignoring_lost_terminal
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.setting_metadata import Command
from qlora_cli.training.checks.input_checks import check_train_inputs


@options.takes(Command.TRAIN)
def train(
    context: typer.Context,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do all up to the first step; say what would run.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Go on although the run is predicted not to fit on the GPU.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Fine-tune a LoRA adapter on a frozen base, in 4 bit by default, and write a run directory."""
    resolved = options.resolve_settings(context, TrainSettings)
    check_train_inputs(resolved)

    from qlora_cli.cli.progress.reporters import reporting  # rich, and below torch: only once the input is right
    from qlora_cli.cli.rendering.training_text import render_plan, render_training

    with reporting() as reporter:
        from qlora_cli.training import train_run

        if dry_run:
            plan = train_run.plan(resolved, reporter, force=force)
        else:
            result = train_run.train(resolved, reporter, force=force)
    if dry_run:
        print_json(plan) if json else render_plan(plan)
        return
    with ignoring_lost_terminal(sys.stdout):  # the run directory holds all of it
        print_json(result) if json else render_training(result)
    if result.interrupted_by is not None:
        raise typer.Exit(128 + signal.Signals[result.interrupted_by])
