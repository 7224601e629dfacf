"""`qlora evaluate MODEL`: loss and perplexity on held-out rows, of base, adapter and merged model side by side."""

import os

import typer

from qlora_cli.cli import options
from qlora_cli.cli.json_output import print_json
from qlora_cli.cli.volume import print_next, volume_of
from qlora_cli.cli.without_compiler import leave_out_compiler
from qlora_cli.settings.models import EvaluateSettings
from qlora_cli.settings.setting_metadata import Command


@options.takes(Command.EVALUATE)
def evaluate(context: typer.Context, json: options.Json = False) -> None:
    """Measure loss and perplexity of a model or run on held-out rows: base, adapter and merged model in one table.

    MODEL is a run, an adapter, a model directory or a hub id. How rows are read is taken over from a run.
    """
    volume = volume_of(context)
    resolved = options.resolve_settings(context, EvaluateSettings)

    from qlora_cli.evaluating.evaluation_checks import check_evaluation  # reads files: not for the help

    check_evaluation(resolved)

    from qlora_cli.cli.progress.reporters import importing, reporting  # rich: only once the input is right
    from qlora_cli.cli.rendering.evaluation_text import render_evaluation
    from qlora_cli.cli.rendering.next_steps import after_evaluation

    if resolved.settings.evaluate.tasks:
        os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars would tear ours; read when it is first imported
    leave_out_compiler(resolved.settings.model.attention)
    with reporting(volume) as reporter:
        with importing(reporter):
            from qlora_cli.evaluating.evaluation import evaluate as run

        evaluation = run(resolved, reporter)
    print_json(evaluation) if json else render_evaluation(evaluation)
    print_next(after_evaluation(evaluation), volume, as_json=json)
