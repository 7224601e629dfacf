"""`qlora inspect-memory MODEL`: the memory that a run will take, without weights and without a GPU."""

import gc
from dataclasses import replace
from typing import Annotated

import typer

from qlora_cli.cli import options
from qlora_cli.cli.json_output import print_json
from qlora_cli.cli.stderr import print_line
from qlora_cli.cli.volume import print_next, volume_of
from qlora_cli.cli.without_compiler import leave_out_compiler
from qlora_cli.errors import OutOfMemoryError
from qlora_cli.settings.setting_metadata import Command

Words = Annotated[list[str] | None, typer.Argument(metavar="NAME=VALUES", help="More to vary, after --sweep.")]

Details = Annotated[
    bool,
    typer.Option("--details", help="Also show what the memory is for, each phase, all cards, and what is assumed."),
]


@options.takes(Command.INSPECT_MEMORY)
def inspect_memory(
    context: typer.Context,
    words: Words = None,
    details: Details = False,
    json: options.Json = False,
) -> None:
    """Predict what training will take on a GPU, and where it fits: without a GPU, and without reading weights.

    MODEL may also be a config.json, or a name of the bundled catalogue. Takes the flags of train that matter here.
    """
    from qlora_cli.cli.commands.memory_request import read_request, reads_data  # not for the help

    request, plot = read_request(context, words or ())
    asked = request.asked.settings.inspect_memory

    from qlora_cli.cli.progress.reporters import reporting  # rich: only once the input is right
    from qlora_cli.cli.rendering.lock_text import failure_line
    from qlora_cli.cli.rendering.memory_text import render_memory
    from qlora_cli.cli.rendering.next_steps import AFTER_PREDICTION
    from qlora_cli.events import Noted

    leave_out_compiler()
    with reporting(volume_of(context)) as reporter:
        from qlora_cli.memory.memory_lock import compare, read_lock, write_lock
        from qlora_cli.memory.memory_report import inspect_memory as predict

        if reads_data(request.asked):
            from qlora_cli.cli.commands.predicted_data import with_rows

            request = with_rows(request, reporter)
        lock = read_lock(asked.check) if asked.check is not None else None
        report = predict(request, reporter)
        if asked.write_lock is not None:
            write_lock(report, asked.write_lock)
        if asked.check is not None and lock is not None:
            report = replace(report, check=compare(report, lock, asked.check, asked.max_change))
        if plot is not None:
            from qlora_cli.memory.plot import plot_sweep

            plot_sweep(report, request.gpus, plot)
            reporter.report(Noted(message=f"the plot is in {plot}"))
    gc.freeze()  # the collection of all imported objects at exit would take a second
    print_json(report) if json else render_memory(report, request.gpus, details=details)
    if report.check is not None and not report.check.passed:
        print_line(failure_line(report.check))
        raise typer.Exit(1)
    if request.gpus and any(fit.fits == "no" for fit in report.fits):
        raise typer.Exit(OutOfMemoryError.exit_code)
    print_next(AFTER_PREDICTION, volume_of(context), as_json=json)
