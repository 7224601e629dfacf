"""`qlora compare RUN RUN…`: which run is better, on the same held-out rows, and by more than chance?"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_cli.cli import options
from qlora_cli.cli.completion import complete_run
from qlora_cli.cli.json_output import print_json
from qlora_cli.cli.stderr import print_line
from qlora_cli.cli.volume import Quiet, print_next, quiet_or_normal
from qlora_cli.errors import Problem, RunNotFoundError, SettingsError, UsageError
from qlora_cli.settings.display import choices_of, metavar
from qlora_cli.settings.models import EvaluateSettings, field_of

if TYPE_CHECKING:
    from qlora_cli.settings.resolve import Resolved

RUN_ARGUMENT = "RUN"
Text = str | None


def _flag(path: str, flag: str, description: str | None = None) -> typer.models.OptionInfo:
    """Return the flag of a setting of `qlora evaluate`, with the help that the setting has there."""
    field = field_of(path)
    placeholder = "DEVICE" if choices_of(field) else metavar(field)
    found = typer.Option(flag, metavar=placeholder, help=description or field.description, show_default=False)
    assert isinstance(found, typer.models.OptionInfo)
    return found


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar=RUN_ARGUMENT,
            help="Run directories, the reference first.",
            show_default=False,
            autocompletion=complete_run,
        ),
    ],
    fail_if_worse: Annotated[
        float | None,
        typer.Option(
            "--fail-if-worse",
            metavar="NATS",
            help="Exit with 1 if a loss exceeds that of the first run by more than this, beyond two standard errors.",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        _flag("data.dataset", "--dataset", "Rows to compare on, if not those that the runs held out."),
    ] = None,
    base_model: Annotated[Text, _flag("model.base_model", "--base-model")] = None,
    device: Annotated[Text, _flag("model.device", "--device")] = None,
    batch_size: Annotated[Text, _flag("evaluate.batch_size", "--batch-size")] = None,
    assignments: options.Assign = None,
    quiet: Quiet = False,
    json: options.Json = False,
) -> None:
    """Compare runs on the same held-out rows: loss by row, speed, memory, and the settings that differ.

    Losses are kept in each run, so that they are measured once.
    """
    _check(runs, fail_if_worse)
    given = {
        "data.dataset": ("--dataset", dataset),
        "model.base_model": ("--base-model", base_model),
        "model.device": ("--device", device),
        "evaluate.batch_size": ("--batch-size", batch_size),
    }
    asked = [_asked(run, given, assignments or ()) for run in runs]

    from qlora_cli.cli.progress.reporters import reporting  # rich: only once the input is right
    from qlora_cli.cli.rendering.comparison_text import failure_line, render_comparison
    from qlora_cli.cli.rendering.next_steps import after_comparison

    volume = quiet_or_normal(quiet)
    with reporting(volume) as reporter:
        from qlora_cli.evaluating.run_comparison import compare as compare_runs

        comparison = compare_runs(asked, fail_if_worse or 0.0, reporter)
    print_json(comparison) if json else render_comparison(comparison, has_margin=fail_if_worse is not None)
    if fail_if_worse is not None and (line := failure_line(comparison)):
        print_line(line)
    if fail_if_worse is not None and comparison.is_worse:
        raise typer.Exit(1)
    print_next(after_comparison(comparison), volume, as_json=json)


def _asked(
    run: Path, given: Mapping[str, tuple[str, object]], assignments: Sequence[str]
) -> "Resolved[EvaluateSettings]":
    """Return what is evaluated of a run, checked as by `qlora evaluate`."""
    from qlora_cli.evaluating.evaluation_checks import check_evaluation  # reads files: not for the help
    from qlora_cli.settings.resolve import Sources, resolve

    flags = {path: entry for path, entry in given.items() if entry[1] not in (None, ())}
    sources = Sources(assignments=assignments, flags={"model.name": (RUN_ARGUMENT, str(run)), **flags})
    resolved = resolve(sources, EvaluateSettings, {"model.name": RUN_ARGUMENT})
    check_evaluation(resolved)
    return resolved


def _check(runs: Sequence[Path], margin: float | None) -> None:
    if margin is not None and not 0 <= margin < float("inf"):
        problem = Problem(
            where="--fail-if-worse", message=f"must be a number of nats from 0, got {margin}", hint="Such as 0.02."
        )
        raise SettingsError([problem])
    if len(runs) < 2:
        raise UsageError("there is only one run", hint="Name two or more: qlora compare RUN RUN")
    from qlora_cli.runs.directory import RunDirectory

    for run in runs:
        if not RunDirectory(run).is_run:
            raise RunNotFoundError(f"{run} is no run directory", hint="List the runs: qlora runs DIR")
