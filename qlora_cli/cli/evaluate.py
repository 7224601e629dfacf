"""`qlora evaluate MODEL`: loss and perplexity on held-out rows, of base, adapter and merged model side by side."""

import os
from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.cli import options
from qlora_cli.cli.output import print_json
from qlora_cli.errors import UsageError
from qlora_cli.evaluating.preflight import check_evaluation
from qlora_cli.evaluating.settings import EvaluateSettings, EvaluationRequest
from qlora_cli.settings.marks import Command

Split = Annotated[
    str | None,
    typer.Option("--split", metavar="TEXT", help="Split of a hub data set. [default: test]", show_default=False),
]
WithBase = Annotated[
    bool | None,
    typer.Option(
        "--base/--no-base", help="Evaluate the base without its adapter too. [default: base]", show_default=False
    ),
]
Merged = Annotated[
    Path | None,
    typer.Option(
        "--merged",
        metavar="DIRECTORY",
        help="Merged model to compare with; by default what qlora merge wrote into the run.",
        show_default=False,
    ),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, metavar="INTEGER", help="Rows at once; halved where they do not fit.")
]
TaskNames = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        metavar="TEXT",
        help="Comma-separated tasks of lm-eval, or YAML files of your own; needs 'qlora-cli[eval]'.",
        show_default=False,
    ),
]
TaskPath = Annotated[
    Path | None,
    typer.Option("--task-path", metavar="DIRECTORY", help="Directory with more tasks.", show_default=False),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, metavar="INTEGER", help="Documents of each task.", show_default=False),
]


@options.takes(Command.EVALUATE, EvaluateSettings, positional="model.name")
def evaluate(
    context: typer.Context,
    split: Split = None,
    base: WithBase = None,
    merged: Merged = None,
    batch_size: BatchSize = 8,
    tasks: TaskNames = None,
    task_path: TaskPath = None,
    limit: Limit = None,
    json: options.Json = False,
) -> None:
    """Measure loss and perplexity of a model or run on held-out rows: base, adapter and merged model in one table.

    MODEL is a run, an adapter, a model directory or a hub id. How rows are read is taken over from a run.
    """
    resolved = options.resolve_settings(context, EvaluateSettings)
    request = EvaluationRequest(
        split=split,
        with_base=base,
        merged=merged,
        batch_size=batch_size,
        tasks=_split_tasks(tasks),
        task_path=task_path,
        limit=limit,
    )
    check_evaluation(resolved, request)

    from qlora_cli.cli.progress import reporting  # rich, and below torch: only once the input is right
    from qlora_cli.cli.render_evaluation import render_evaluation

    if request.tasks:
        os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars would tear ours; read when it is first imported
    with reporting() as reporter:
        from qlora_cli.evaluating.run import evaluate as run

        evaluation = run(resolved, request, reporter)
    print_json(evaluation) if json else render_evaluation(evaluation)


def _split_tasks(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UsageError("--tasks must name at least one", hint="For example: --tasks hellaswag,arc_easy")
    return names
