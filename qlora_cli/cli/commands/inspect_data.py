"""`qlora inspect-data`: what is read, which tokens are trained, and what is lost, before a weight is read."""

import typer

from qlora_cli.cli import options
from qlora_cli.cli.json_output import print_json
from qlora_cli.cli.stderr import print_line
from qlora_cli.cli.volume import print_next, volume_of
from qlora_cli.cli.without_compiler import leave_out_compiler
from qlora_cli.errors import DataError, SettingsError
from qlora_cli.settings.models import InspectDataSettings
from qlora_cli.settings.setting_metadata import Command


@options.takes(Command.INSPECT_DATA)
def inspect_data(context: typer.Context, json: options.Json = False) -> None:
    """Show which tokens of a data set are trained, and what is truncated, dropped or wrong. Reads no weights.

    Ends with exit code 2, after the report, where train would refuse the data: for a row that can't be used
    (--on-bad-row skip), one that is too long (--on-long), or too much that is lost (--accept-lost).
    """
    resolved = options.resolve_settings(context, InspectDataSettings)
    settings = resolved.settings
    html = settings.inspect_data.html

    from qlora_cli.data.opening.first_rows import first_rows_errors, on_this_disk  # readers: not for the help
    from qlora_cli.data.opening.name_checks import data_problems
    from qlora_cli.settings.error_collector import ErrorCollector
    from qlora_cli.settings.settle import settle

    if problems := data_problems(resolved, settings.data):
        raise SettingsError(problems)
    errors = ErrorCollector(resolved.where_of)
    errors.extend(first_rows_errors(settings.data, settings.training.seed, include=on_this_disk))
    errors.raise_collected()

    from qlora_cli.cli.progress.reporters import importing, reporting  # rich: only once the settings are right
    from qlora_cli.cli.rendering.data_text import render_data
    from qlora_cli.cli.rendering.next_steps import AFTER_INSPECTION
    from qlora_cli.data.showing.page_file import check_page
    from qlora_cli.events import Noted, PhaseStarted

    if html is not None and (problem := check_page(html)):
        raise problem.for_setting("inspect_data.html")
    leave_out_compiler()
    with reporting(volume_of(context)) as reporter:
        with importing(reporter):
            from qlora_cli.data.showing.inspection import inspect_data as look_at
            from qlora_cli.data.tokenizing.encode import TextTokenizer
            from qlora_cli.tokenizing.positions import LENGTH, limit_length, note_length
            from qlora_cli.tokenizing.text_interface import load_text_interface

        asked = settings.data.max_length if resolved.is_given(LENGTH) else None
        text = load_text_interface(settings.model, reporter, max_length=asked)
        settled = settle(resolved, limit_length(settings, text.num_positions))
        note_length(settled, reporter)
        data = settled.settings.data
        reporter.report(PhaseStarted(title=f"Reading {', '.join(data.dataset)}"))
        tokenizer = TextTokenizer(
            tokenizer=text.tokenizer.tokenizer, end_ids=text.tokenizer.end_ids, reporter=reporter
        )
        inspection = look_at(data, settings.training, tokenizer, num_previews=settings.inspect_data.rows)
        if html is not None:
            from qlora_cli.data.showing.page import write_page

            write_page(inspection, html, model=settings.model.name)
            reporter.report(Noted(message=f"the page is in {html}"))
    print_json(inspection.as_json()) if json else render_data(inspection)
    for refusal in inspection.refusals:
        print_line(f"error: {refusal}")
    if not inspection.refusals:
        print_next(AFTER_INSPECTION, volume_of(context), as_json=json)
    else:
        print_line("  hint: train would end with this; see qlora inspect-data --help for what may be accepted")
        raise typer.Exit(DataError.exit_code)
