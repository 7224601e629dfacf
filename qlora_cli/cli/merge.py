"""`qlora merge`: the merged model is the model that was trained."""

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.cli import options
from qlora_cli.cli.output import print_json
from qlora_cli.merging.preflight import check_merge
from qlora_cli.merging.request import MergeRequest
from qlora_cli.settings.choices import BaseWeights, Device, ExportFormat, GgufType, MergeDtype


def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_OR_ADAPTER...",
            help="Run directory, adapter directory or hub id of an adapter; several are added together.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="DIRECTORY",
            help="Where the result goes: merged/ in the run, or NAME-merged here, if it is not given.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        BaseWeights,
        typer.Option(
            "--base",
            help="Weights to merge into: as stored, or dequantized, as training saw them. auto measures both.",
        ),
    ] = BaseWeights.AUTO,
    dtype: Annotated[
        MergeDtype, typer.Option("--dtype", help="What the result is written in; keep is each tensor's own.")
    ] = MergeDtype.KEEP,
    formats: Annotated[
        list[ExportFormat] | None,
        typer.Option(
            "--format", help="What is written; may be given several times. [default: hf]", show_default=False
        ),
    ] = None,
    weights: Annotated[
        list[float] | None,
        typer.Option(
            "--weight",
            metavar="NUMBER",
            help="How much an adapter counts, in their order. [default: 1]",
            show_default=False,
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the result with the base and the adapter beside it.")
    ] = True,
    max_divergence: Annotated[
        float | None,
        typer.Option(
            "--max-divergence",
            metavar="NATS",
            help="Largest mean KL divergence a token that rounding may make; no bound if it is not given.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, tensor by tensor.")] = False,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", help="Another base than the adapter names.", show_default=False),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option("--revision", help="Branch, tag or commit of an adapter on the hub.", show_default=False),
    ] = None,
    device: Annotated[
        Device, typer.Option("--device", help="Where models run to be compared; merging needs no GPU.")
    ] = Device.AUTO,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(
            "--llama-cpp", metavar="DIRECTORY", help="Checkout of llama.cpp, for --format gguf.", show_default=False
        ),
    ] = None,
    gguf_type: Annotated[
        GgufType, typer.Option("--gguf-type", help="Type of the weights in the GGUF file.")
    ] = GgufType.AUTO,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub", metavar="OWNER/NAME", help="Push the result to this repository.", show_default=False
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private/--public", help="Whether that repository is private, if it is made.")
    ] = True,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickled .bin weights if there are no safetensors.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Merge adapters into their base, tensor by tensor on the CPU, and prove that the result is what was trained."""
    request = MergeRequest(
        adapters=tuple(adapters),
        weights=tuple(weights or [1.0] * len(adapters)),
        output=output,
        base=base,
        base_model=base_model,
        revision=revision,
        dtype=dtype,
        formats=tuple(dict.fromkeys(formats or [ExportFormat.HF])),
        verify=verify,
        max_divergence=max_divergence,
        device=device,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        push_to_hub=push_to_hub,
        hub_private=private,
        llama_cpp=llama_cpp,
        gguf_type=gguf_type,
    )
    check_merge(request)

    from qlora_cli.cli.progress import reporting  # rich, and below torch: only once the input is right
    from qlora_cli.cli.render_merge import render_merge, render_merge_plan
    from qlora_cli.cli.termination import terminated_cleanly

    with reporting() as reporter, terminated_cleanly():
        from qlora_cli.merging import run

        if dry_run:
            report = run.plan(request, reporter)
        else:
            result = run.merge(request, reporter)
    if dry_run:
        print_json(report) if json else render_merge_plan(report)
    else:
        print_json(result) if json else render_merge(result)
