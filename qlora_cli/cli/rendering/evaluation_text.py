"""The text of `qlora evaluate`: a line for each model, readable at 80 columns, and one for each figure of a task."""

from collections.abc import Sequence

from rich.text import Text

from qlora_cli.cli.console import console, title
from qlora_cli.evaluating.evaluation_result import Evaluation, QuantizationCost, SourceResult, TaskResult
from qlora_cli.units import counted
from qlora_cli.visible import visible

HEADINGS = ("", "loss", "perplexity", "accuracy", "against base", "tok/s")
TASK_HEADINGS = ("task", "", "metric", "value")
GAP = "  "
NOTHING = "-"
DIGITS = 4


def render_evaluation(evaluation: Evaluation) -> None:
    """Print an evaluation."""
    if evaluation.sources:
        first = evaluation.sources[0]
        rows = f"{counted(first.num_rows, 'row')}, {first.num_tokens:,} tokens evaluated, {evaluation.compute_dtype}"
        title(f"{visible(evaluation.model)} on {visible(evaluation.dataset or NOTHING)}")
        console().print(Text(f"  {rows}"), soft_wrap=True)
        print_table([HEADINGS, *map(source_cells, evaluation.sources)], num_names=1)
    if evaluation.quantization_cost is not None:
        console().print(Text(f"  {cost_line(evaluation.quantization_cost)}"), soft_wrap=True)
    if evaluation.tasks:
        title(f"{visible(evaluation.model)}: tasks of lm-eval")
        print_table([TASK_HEADINGS, *map(task_cells, evaluation.tasks)], num_names=3)


def cost_line(cost: QuantizationCost) -> str:
    """Return what quantization costs, in a line."""
    loss = with_stderr(cost.loss_difference, cost.loss_difference_stderr, sign="+")
    kl = with_stderr(cost.mean_kl, cost.mean_kl_stderr)
    same = f"{cost.top_token_agreement:.1%} same top token"
    return f"{cost.quantization} costs {loss} nats; KL {kl}, {same}"


def source_cells(source: SourceResult) -> tuple[str, ...]:
    """Return the table cells of a model, by `HEADINGS`."""
    return (
        f"{source.source} ({source.quantization})" if source.quantization != "none" else source.source,
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
