"""`qlora inspect-memory MODEL`: what a run will take, before a weight is read or a GPU rented."""

import gc
import os
from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.cli import options
from qlora_cli.cli.memory_flags import PLOT_FORMATS, SDPA_BACKENDS, Given, read_request
from qlora_cli.cli.output import print_json
from qlora_cli.errors import OutOfMemoryError
from qlora_cli.memory.request import Recipe
from qlora_cli.memory.solve import SETTINGS
from qlora_cli.settings.marks import Command
from qlora_cli.settings.models import EstimateSettings

Words = Annotated[list[str] | None, typer.Argument(metavar="NAME=VALUES", help="More to vary, after --sweep.")]
Gpus = Annotated[
    list[str] | None,
    typer.Option("--gpu", metavar="NAME|SIZE|auto", help="GPU to fit on: 'RTX 4090', 24GiB, auto; may be repeated."),
]
Whose = Annotated[
    str,
    typer.Option(
        "--recipe", metavar="|".join(Recipe), help="Whose run: that of train, or of a Trainer with plain PEFT."
    ),
]
SdpaBackend = Annotated[
    str,
    typer.Option(
        "--sdpa-backend",
        metavar="|".join(SDPA_BACKENDS),
        help="Which backend scaled_dot_product_attention is pinned to; auto: the one that the GPU takes.",
    ),
]
Evaluate = Annotated[
    bool | None,
    typer.Option(
        "--eval/--no-eval",
        help="Run an evaluation batch too. [default: if the settings ask for evaluation]",
        show_default=False,
    ),
]
Solve = Annotated[
    list[str] | None,
    typer.Option(
        "--solve", metavar="|".join(SETTINGS), help="Find the largest that fits on each --gpu; may be repeated."
    ),
]
Sweep = Annotated[
    list[str] | None,
    typer.Option(
        "--sweep",
        metavar="NAME=VALUES",
        help="Vary what --solve takes: max-length=512..32768 (doubling), rank=8,16.",
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE",
        help=f"Draw memory against --max-length into this file ({', '.join(PLOT_FORMATS)}).",
        show_default=False,
    ),
]


@options.takes(Command.INSPECT_MEMORY, EstimateSettings, positional="model.name")
def inspect_memory(
    context: typer.Context,
    words: Words = None,
    gpu: Gpus = None,
    recipe: Whose = Recipe.QLORA.value,
    sdpa_backend: SdpaBackend = SDPA_BACKENDS[0],
    evaluate: Evaluate = None,
    solve: Solve = None,
    sweep: Sweep = None,
    plot: Plot = None,
    json: options.Json = False,
) -> None:
    """Predict what training will take on a GPU, and where it fits: without a GPU, and without reading weights.

    MODEL may also be a config.json, or a name of the bundled catalogue. Takes the flags of train that matter here.
    """
    request = read_request(
        context,
        Given(
            words=words or (),
            gpus=gpu or (),
            recipe=recipe,
            sdpa_backend=sdpa_backend,
            evaluate=evaluate,
            solve=solve or (),
            sweep=sweep or (),
            plot=plot,
        ),
    )

    from qlora_cli.cli.progress import reporting  # rich: only once the input is right
    from qlora_cli.cli.render_memory import render_memory
    from qlora_cli.events import Noted

    # Nothing is compiled here, and the compiler of PyTorch takes a second to import (bitsandbytes asks for it).
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    with reporting() as reporter:
        from qlora_cli.memory.inspect import inspect_memory as predict

        report = predict(request, reporter)
        if plot is not None:
            from qlora_cli.memory.plot import plot_sweep

            plot_sweep(report, request.gpus, plot)
            reporter.report(Noted(message=f"the picture is in {plot}"))
    gc.freeze()  # looking through all that was imported for garbage, at the end, takes a second
    print_json(report) if json else render_memory(report, request.gpus)
    if request.gpus and any(fit.fits == "no" for fit in report.fits):
        raise typer.Exit(OutOfMemoryError.exit_code)
