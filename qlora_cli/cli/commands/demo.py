"""`qlora demo`: all steps on a bundled model, in two minutes on a laptop."""

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.cli import options
from qlora_cli.cli.json_output import print_json
from qlora_cli.cli.volume import Quiet, print_next, quiet_or_normal
from qlora_cli.cli.without_compiler import leave_out_compiler


def demo(
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIRECTORY", help="Keep the run directory here.", show_default=False),
    ] = None,
    quiet: Quiet = False,
    json: options.Json = False,
) -> None:
    """Fine-tune the bundled tiny model with NF4 and LoRA, and compare it before and after."""
    from qlora_cli.runs.directory import check_free_directory

    if output is not None and (problem := check_free_directory(output)):
        raise problem

    from qlora_cli.cli.progress.reporters import importing, reporting
    from qlora_cli.cli.rendering.next_steps import AFTER_DEMO
    from qlora_cli.cli.rendering.training_text import render_demo

    volume = quiet_or_normal(quiet)
    leave_out_compiler()
    with reporting(volume) as reporter:
        with importing(reporter):
            from qlora_cli.demo.demonstration import run_demo

        result = run_demo(output, reporter)
    print_json(result) if json else render_demo(result)
    if result.train.interrupted_by is not None:
        import signal

        raise typer.Exit(128 + signal.Signals[result.train.interrupted_by])
    print_next(AFTER_DEMO, volume, as_json=json)
