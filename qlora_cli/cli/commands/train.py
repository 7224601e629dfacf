"""`qlora train`: fine-tune a LoRA adapter on a quantized base."""

import os
import signal
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_cli.cli import options
from qlora_cli.cli.json_output import print_json
from qlora_cli.cli.robust_stream import ignoring_lost_terminal
from qlora_cli.cli.volume import Volume, print_next, volume_of
from qlora_cli.cli.without_compiler import leave_out_compiler
from qlora_cli.errors import QloraError
from qlora_cli.garbage import gc_disabled
from qlora_cli.ranks.group import ALONE, ProcessGroup, failing_together
from qlora_cli.ranks.place import Place, place_in
from qlora_cli.settings.choices import Device
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.setting_metadata import Command

if TYPE_CHECKING:
    from qlora_cli.runs.run_result import TrainResult
    from qlora_cli.settings.resolve import Resolved

NUM_GPUS = "training.num_gpus"
TOLD_BY_EACH = ("RendezvousError", "SumError")  # of several processes, which can't tell one another


@options.takes(Command.TRAIN)
def train(
    context: typer.Context,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do all up to the first step; say what would run.")
    ] = False,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Fine-tune a LoRA adapter on a frozen base, in 4 bit by default, and write a run directory."""
    volume = volume_of(context)
    resolved = options.resolve_settings(context, TrainSettings)

    from qlora_cli.training.checks.input_checks import check_train_inputs  # readers of data: not for the help

    check_train_inputs(resolved)

    if dry_run:
        from qlora_cli.cli.progress.reporters import importing, reporting  # rich: only once the input is right
        from qlora_cli.cli.rendering.next_steps import AFTER_PLAN
        from qlora_cli.cli.rendering.training_text import render_plan

        _leave_out_compiler(resolved)
        with reporting(volume) as reporter:
            with importing(reporter):
                from qlora_cli.training import train_run

            plan = train_run.plan(resolved, reporter, force=force)
        print_json(plan) if json else render_plan(plan)
        print_next(AFTER_PLAN, volume, as_json=json)
        return
    place = place_in(os.environ)
    num_gpus, is_cpu = resolved.settings.training.num_gpus, resolved.settings.model.device == Device.CPU
    if num_gpus > 1 and place.size == 1:
        from qlora_cli.ranks.launch import check_gpus, launch

        if not is_cpu:
            check_gpus(num_gpus)
        raise typer.Exit(launch(num_gpus, sys.argv[1:]))
    try:
        result = _train(_shared_by(place, resolved), place, force=force, as_json=json, volume=volume)
    except QloraError as error:
        is_told = place.rank > 0 and type(error).__name__ not in TOLD_BY_EACH
        if is_told:  # by the first process
            raise typer.Exit(error.exit_code) from error
        raise
    if result.interrupted_by is not None:
        raise typer.Exit(128 + signal.Signals[result.interrupted_by])


def _joined(place: Place, settings: TrainSettings) -> AbstractContextManager[ProcessGroup]:
    """Return the group of this process; one that is alone learns it without torch."""
    if place.size == 1:
        return nullcontext(ALONE)
    with gc_disabled():
        from qlora_cli.ranks.distributed_group import joined

    return joined(place, settings.training.num_gpus, on_cpu=settings.model.device == Device.CPU)


def _leave_out_compiler(resolved: "Resolved[TrainSettings]") -> None:
    training = resolved.settings.training
    leave_out_compiler(resolved.settings.model.attention, compiles_layers=training.torch_compile)


def _shared_by(place: Place, resolved: "Resolved[TrainSettings]") -> "Resolved[TrainSettings]":
    """Return the settings with as many processes as a launcher has started, unless their number is given."""
    if place.size == 1 or resolved.is_given(NUM_GPUS):
        return resolved
    from qlora_cli.settings.settle import InferredSettings, inferred_origin, settle

    launcher = InferredSettings(values={NUM_GPUS: place.size}, origin=inferred_origin("torchrun"), is_fixed=True)
    return settle(resolved, [launcher])


def _train(
    resolved: "Resolved[TrainSettings]", place: Place, *, force: bool, as_json: bool, volume: Volume
) -> "TrainResult":
    """Train in this process, alone or as one of several, of which the first one reports."""
    from qlora_cli.cli.progress.reporters import importing, reporting
    from qlora_cli.cli.rendering.next_steps import after_training
    from qlora_cli.cli.rendering.training_text import render_training
    from qlora_cli.events import Reporters

    _leave_out_compiler(resolved)
    with _joined(place, resolved.settings) as group, failing_together(group):
        with reporting(volume) if group.is_first else nullcontext(Reporters([])) as reporter:
            with importing(reporter):
                from qlora_cli.training import train_run

            result = train_run.train(resolved, reporter, force=force, group=group)
        if group.is_first:
            with ignoring_lost_terminal(sys.stdout):  # the run directory holds all of it
                print_json(result) if as_json else render_training(result)
            print_next(after_training(result), volume, as_json=as_json)
        return result
