"""The text of `qlora tune`: what it will cost, then a line for each trial, readable at 80 columns."""

from qlora_cli.cli.console import print_lines, print_rows, title
from qlora_cli.cli.rendering.evaluation_text import NOTHING, print_table, with_stderr
from qlora_cli.tuning.tuning_result import TrialResult, TunePlan, TuneResult
from qlora_cli.units import counted, format_duration
from qlora_cli.visible import visible

HEADINGS = ("learning rate", "steps", "loss", "above the best", "", "time")


def render_tune_plan(plan: TunePlan) -> None:
    """Print what a search would cost."""
    title("Would try (nothing was written)")
    rows = [
        ("model", visible(plan.model)),
        ("learning rates", ", ".join(f"{rate:g}" for rate in plan.learning_rates)),
        ("steps of a trial", ", then ".join(f"{steps:,}" for steps in plan.trial_steps)),
        ("cost", plan.sentence),
        ("held out", f"{counted(plan.num_eval_rows, 'row')}, {counted(plan.num_eval_tokens, 'token')}"),
        ("output", str(plan.output)),
    ]
    if plan.step_seconds is not None:
        rows.insert(4, ("a step", f"{format_duration(plan.step_seconds)} predicted"))
    print_rows(rows)


def render_tuning(result: TuneResult) -> None:
    """Print the result of a search."""
    rows = f"{counted(result.num_eval_rows, 'row')}, {result.num_eval_tokens:,} tokens"
    title(f"Learning rate {result.learning_rate:g}: {visible(result.model)} on {rows} of {visible(result.dataset)}")
    print_table([HEADINGS, *map(trial_cells, result.trials)], num_names=1)
    print_rows(
        [
            ("before training", f"loss {result.start_loss:.4f}"),
            ("time", format_duration(result.seconds)),
            ("settings", str(result.settings_file)),
            ("page", str(result.page)),
        ]
    )
    if result.notes:
        title("Notes")
        print_lines([f"  {visible(note)}" for note in result.notes])


def trial_cells(trial: TrialResult) -> tuple[str, ...]:
    """Return the table cells of a trial, by `HEADINGS`."""
    return (
        f"{trial.learning_rate:g}",
        f"{trial.num_steps:,}",
        NOTHING if trial.loss is None else f"{trial.loss:.4f}",
        "" if trial.difference is None else with_stderr(trial.difference, trial.difference_stderr, sign="+"),
        trial.verdict,
        format_duration(trial.seconds),
    )
