"""The text of `qlora compare`: a line for each run, readable at 80 columns, and one for each setting that differs."""

from collections.abc import Iterator, Sequence
from os.path import commonpath
from pathlib import Path

from qlora_cli.cli.console import print_lines, print_rows, title
from qlora_cli.cli.rendering.evaluation_text import NOTHING, print_table, share_with_stderr, with_stderr
from qlora_cli.evaluating.comparison_result import ComparedRun, LossOf, RunComparison, Verdict
from qlora_cli.runs.record import as_text
from qlora_cli.units import counted, format_bytes
from qlora_cli.visible import visible

HEADINGS = ("run", "loss", "against the first", "", "tok/s", "memory")
VERDICTS: dict[Verdict, str] = {"reference": "", "worse": "worse", "not_worse": "not worse", "unclear": "unclear"}
# Without a margin, to be below it is to be better.
VERDICTS_OF_NONE: dict[Verdict, str] = {**VERDICTS, "not_worse": "better"}
LOSS_HEADINGS: dict[LossOf, str] = {"dpo": "dpo loss", "orpo": "orpo loss", "kto": "kto loss", "chosen": "chosen loss"}
OF_ANSWERS: dict[LossOf, str] = {**dict.fromkeys(LOSS_HEADINGS, " of chosen answers"), "tokens": ""}
LONGEST_NAME = 24


def render_comparison(comparison: RunComparison, *, has_margin: bool) -> None:
    """Print a comparison; `has_margin`: the verdicts are on a margin that was given."""
    rows = f"{counted(comparison.num_rows, 'row')}, {comparison.num_tokens:,} tokens{OF_ANSWERS[comparison.loss_of]}"
    title(f"{counted(len(comparison.runs), 'run')} on {visible(comparison.dataset or NOTHING)}: {rows}")
    names = _names([run.path for run in comparison.runs])
    verdicts = VERDICTS if has_margin else VERDICTS_OF_NONE
    cells = [run_cells(name, run, verdicts) for name, run in zip(names, comparison.runs, strict=True)]
    name, _, *others = HEADINGS
    print_table([(name, LOSS_HEADINGS.get(comparison.loss_of, "loss"), *others), *cells], num_names=1)
    if accuracies := list(_accuracy_rows(names, comparison.runs)):
        title("Answers that are preferred as in the data")
        print_rows(accuracies)
    if updates := list(_update_rows(names, comparison.runs)):
        title("Updates of the adapters")
        print_rows(updates)
    named = list(zip(names, comparison.runs, strict=True))
    if forgetting := [(name, visible(run.forgetting.sentence)) for name, run in named if run.forgetting]:
        title("General text")
        print_rows(forgetting)
    if comparison.differing_settings:
        title("Settings that differ")
        print_rows(list(_setting_rows(comparison)))
    if comparison.notes:
        title("Notes")
        print_lines([f"  {visible(note)}" for note in comparison.notes])


def run_cells(name: str, run: ComparedRun, verdicts: dict[Verdict, str]) -> tuple[str, ...]:
    """Return the table cells of a run, by `HEADINGS`."""
    memory = run.peak_device_bytes or run.peak_host_bytes
    is_same = run.difference == run.difference_stderr == 0
    return (
        name,
        with_stderr(run.loss, run.loss_stderr),
        "" if run.verdict == "reference" else with_stderr(run.difference, run.difference_stderr, sign="+"),
        "the same" if is_same else verdicts[run.verdict],
        NOTHING if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
        NOTHING if memory is None else format_bytes(memory),
    )


def failure_line(comparison: RunComparison) -> str | None:
    """Return which runs fail the margin, or for which the rows can't tell; None if all pass."""
    for verdict, says in (
        ("worse", "worse than {first} by more than {margin}, beyond two standard errors"),
        ("unclear", "can't be told from {first} within {margin}: hold out more rows"),
    ):
        if paths := [str(run.path) for run in comparison.runs if run.verdict == verdict]:
            unit = "of the kto loss" if comparison.loss_of == "kto" else "nats"
            said = says.format(first=comparison.reference, margin=f"{comparison.margin:g} {unit}")
            return f"{'failed' if verdict == 'worse' else 'warning'}: {', '.join(paths)}: {said}"
    return None


def _names(paths: Sequence[Path]) -> list[str]:
    """Return short names: without the folder that all are in, and the ends of long ones."""
    parts = [str(path) for path in paths]
    shared = commonpath([path.absolute().parent for path in paths])
    short = [str(path.absolute().relative_to(shared)) for path in paths]
    return [
        name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"
        for name in map(visible, short if len(set(short)) == len(set(parts)) else parts)
    ]


def _accuracy_rows(names: Sequence[str], runs: Sequence[ComparedRun]) -> Iterator[tuple[str, str]]:
    for name, run in zip(names, runs, strict=True):
        if run.accuracy is not None:
            difference = ""
            if run.accuracy_difference is not None:
                difference = share_with_stderr(run.accuracy_difference, run.accuracy_difference_stderr, sign="+")
            yield name, share_with_stderr(run.accuracy, run.accuracy_stderr) + (difference and f", {difference}")


def _update_rows(names: Sequence[str], runs: Sequence[ComparedRun]) -> Iterator[tuple[str, str]]:
    for name, run in zip(names, runs, strict=True):
        if run.adapter_rank is not None and run.effective_rank is not None:
            norm = "" if run.relative_update_norm is None else f"; {run.relative_update_norm:.2%} of the weights"
            yield name, f"rank {run.adapter_rank} uses {run.effective_rank:.1f}{norm}"


def _setting_rows(comparison: RunComparison) -> Iterator[tuple[str, str]]:
    for setting in comparison.differing_settings:
        yield setting.setting, " | ".join(visible(as_text(value)) for value in setting.values)
