"""The text of `qlora evaluate`: a line for each model, readable at 80 columns, and one for each figure of a task."""

from collections.abc import Sequence

from rich.text import Text

from qlora_cli.cli.console import console, title
from qlora_cli.evaluating.evaluation_result import (
    EvaluatedAnswers,
    Evaluation,
    PreferenceResult,
    QuantizationCost,
    SourceResult,
    TaskResult,
)
from qlora_cli.units import counted
from qlora_cli.visible import visible

HEADINGS = ("", "loss", "perplexity", "accuracy", "against base", "tok/s")
TASK_HEADINGS = ("task", "", "metric", "value")
PREFERENCE_LINES = {
    "pairs": ("loss", "accuracy", "margin", "reward of chosen", "reward of rejected"),
    "labels": ("loss", "accuracy", "margin", "reward of wanted", "reward of unwanted", "KL"),
}
GAP = "  "
NOTHING = "-"
DIGITS = 4


def render_evaluation(evaluation: Evaluation) -> None:
    """Print an evaluation."""
    if evaluation.sources:
        first = evaluation.sources[0]
        rows = f"{rows_line(first, evaluation.compared_answers)} evaluated, {evaluation.compute_dtype}"
        title(f"{visible(evaluation.model)} on {visible(evaluation.dataset or NOTHING)}")
        console().print(Text(f"  {rows}"), soft_wrap=True)
        print_table([HEADINGS, *map(source_cells, evaluation.sources)], num_names=1)
    if evaluation.compared_answers is not None:
        _print_preferences(evaluation.compared_answers, evaluation.sources)
    if evaluation.quantization_cost is not None:
        console().print(Text(f"  {cost_line(evaluation.quantization_cost)}"), soft_wrap=True)
    if evaluation.tasks:
        title(f"{visible(evaluation.model)}: tasks of lm-eval")
        print_table([TASK_HEADINGS, *map(task_cells, evaluation.tasks)], num_names=3)


def rows_line(first: SourceResult, answers: EvaluatedAnswers | None) -> str:
    """Return what was measured: rows, or those of answers that are compared, and the tokens that losses are of."""
    tokens = f"{first.num_tokens:,} tokens"
    if answers is None:
        return f"{counted(first.num_rows, 'row')}, {tokens}"
    if answers.rows == "pairs":
        return f"{counted(answers.num_rows, 'pair')}, {tokens} of the chosen answers"
    return f"{counted(answers.num_rows, 'answer')} with labels, {tokens} of the {first.num_rows:,} wanted ones"


def _print_preferences(answers: EvaluatedAnswers, sources: Sequence[SourceResult]) -> None:
    """Print what each model makes of answers that are compared: a column for each of them."""
    known = [(source_name(one), one.preference) for one in sources if one.preference is not None]
    if not known:
        return
    objective = "rewards" if answers.objective == "sft" else answers.objective
    names = [f"{objective}, beta {answers.beta:g}", *PREFERENCE_LINES[answers.rows]]
    columns = [(name, *preference_cells(result, answers)) for name, result in known]
    rows = [row for row in zip(names, *columns, strict=True) if any(cell not in ("", NOTHING) for cell in row[1:])]
    console().print()
    print_table(rows, num_names=1)


def preference_cells(result: PreferenceResult, answers: EvaluatedAnswers) -> tuple[str, ...]:
    """Return the figures of a model, by `PREFERENCE_LINES`."""
    return (
        with_stderr(result.loss, result.loss_stderr),
        share_with_stderr(result.accuracy, result.accuracy_stderr),
        with_stderr(result.margin, result.margin_stderr, sign="+"),
        with_stderr(result.chosen_reward, result.chosen_reward_stderr, sign="+"),
        with_stderr(result.rejected_reward, result.rejected_reward_stderr, sign="+"),
        *(() if answers.rows == "pairs" else (with_stderr(result.kl, None),)),
    )


def source_name(source: SourceResult) -> str:
    """Return the name of a model in a table, with its quantization."""
    return f"{source.source} ({source.quantization})" if source.quantization != "none" else source.source


def share_with_stderr(value: float, stderr: float | None, sign: str = "") -> str:
    """Return a share in percent with its standard error; `sign` is `+` for a difference."""
    shown = f"{100 * value:{sign}.1f}%"
    return shown if stderr is None else f"{shown} ± {100 * stderr:.1f}%"


def cost_line(cost: QuantizationCost) -> str:
    """Return what quantization costs, in a line."""
    loss = with_stderr(cost.loss_difference, cost.loss_difference_stderr, sign="+")
    kl = with_stderr(cost.mean_kl, cost.mean_kl_stderr)
    same = f"{cost.top_token_agreement:.1%} same top token"
    return f"{cost.quantization} costs {loss} nats; KL {kl}, {same}"


def source_cells(source: SourceResult) -> tuple[str, ...]:
    """Return the table cells of a model, by `HEADINGS`."""
    return (
        source_name(source),
        with_stderr(source.loss, source.loss_stderr),
        NOTHING if source.perplexity is None else _perplexity(source.perplexity),
        f"{source.token_accuracy:.1%}",
        "" if source.difference is None else with_stderr(source.difference, source.difference_stderr, sign="+"),
        f"{source.tokens_per_second:,.0f}",
    )


def task_cells(figure: TaskResult) -> tuple[str, ...]:
    """Return the table cells of a figure, by `TASK_HEADINGS`."""
    return visible(figure.task), figure.source, visible(figure.metric), with_stderr(figure.value, figure.stderr)


def _perplexity(value: float) -> str:
    """Return a perplexity with about four significant digits."""
    decimals = 2 if value < 100 else 1 if value < 1000 else 0
    return f"{value:,.{decimals}f}" if value < 1e6 else f"{value:.4g}"


def with_stderr(value: float | None, stderr: float | None, sign: str = "") -> str:
    """Return a figure with its standard error, to four decimals; `sign` is `+` for a difference."""
    if value is None:
        return NOTHING
    shown = f"{value:{sign}.{DIGITS}f}"
    return shown if stderr is None else f"{shown} ± {stderr:.{DIGITS}f}"


def print_table(rows: Sequence[tuple[str, ...]], *, num_names: int) -> None:
    """Print rows with headings; the first columns are names, the others figures."""
    columns = [column for column in zip(*rows, strict=True) if any(cell for cell in column[1:])]
    widths = [max(map(len, column)) for column in columns]
    for number, row in enumerate(zip(*columns, strict=True)):
        cells = [
            f"{cell:<{width}}" if column < num_names else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        console().print(Text(f"  {GAP.join(cells)}", style="bold" if number == 0 else ""), soft_wrap=True)
