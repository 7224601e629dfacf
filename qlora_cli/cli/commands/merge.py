"""`qlora merge`: the merged model is the model that was trained."""

from typing import Annotated

import typer

from qlora_cli.cli import options
from qlora_cli.cli.json_output import print_json
from qlora_cli.cli.volume import Volume, print_next, volume_of
from qlora_cli.cli.without_compiler import leave_out_compiler
from qlora_cli.settings.models import MergeCommandSettings
from qlora_cli.settings.setting_metadata import Command


@options.takes(Command.MERGE)
def merge(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, tensor by tensor.")] = False,
    json: options.Json = False,
) -> None:
    """Merge adapters into their base, tensor by tensor on the CPU, and prove that the result is what was trained."""
    volume = volume_of(context)
    resolved = options.resolve_settings(context, MergeCommandSettings)
    request = resolved.settings

    from qlora_cli.merging.merge_checks import check_merge  # reads files: not for the help

    check_merge(request, resolved.where_of)

    from qlora_cli.cli.progress.reporters import importing, reporting  # rich: only once the input is right
    from qlora_cli.cli.rendering.merge_text import render_merge, render_merge_plan
    from qlora_cli.cli.rendering.next_steps import AFTER_PLAN, after_merge
    from qlora_cli.cli.termination import signals_as_errors

    leave_out_compiler()
    with reporting(volume) as reporter, signals_as_errors():
        with importing(reporter):
            from qlora_cli.merging import merge_run

        if dry_run:
            report = merge_run.plan(request, reporter)
        else:
            result = merge_run.merge(request, reporter)
    if dry_run:
        print_json(report) if json else render_merge_plan(report)
    else:
        print_json(result) if json else render_merge(result, in_detail=volume == Volume.VERBOSE)
    print_next(AFTER_PLAN if dry_run else after_merge(result), volume, as_json=json)
