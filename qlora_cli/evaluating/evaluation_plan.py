"""What is evaluated: the model that was named, as its run loaded it, and the rows, read as its run read them."""

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_cli.data.tokenizing.encode import TextTokenizer
from qlora_cli.errors import DataError
from qlora_cli.evaluating.compared_rows import ComparedRows
from qlora_cli.evaluating.evaluation_checks import names_rows
from qlora_cli.evaluating.rows import (
    HeldOutRows,
    TrainedRows,
    has_rows,
    inferred_from_rows,
    nothing_held_out,
    read_rows,
    trained_rows,
)
from qlora_cli.events import Noted, PhaseStarted, Reporter
from qlora_cli.loading.load_plan import LoadPlan, check_placement, plan_outlined
from qlora_cli.loading.loader import check_weights
from qlora_cli.loading.model_outline import ModelOutline, find, settle_load
from qlora_cli.settings.choices import LossOn
from qlora_cli.settings.models import EvaluateSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.settle import InferredSettings
from qlora_cli.units import counted


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """A model that can be loaded, and how to read the rows; `run` is the record of its rows, if it is a run's.

    `outline` are the small files of the model.
    """

    asked: Resolved[EvaluateSettings]
    settled: EvaluateSettings
    outline: ModelOutline
    load_plan: LoadPlan
    run: TrainedRows | None

    @property
    def has_rows(self) -> bool:
        """Whether the rows are known: named, or held out of training."""
        return has_rows(self.asked, self.run)

    def read_rows(self, reporter: Reporter) -> HeldOutRows:
        """Read and tokenize the rows, and report what became of them.

        Raises:
            DataError: they are not known, or can't be read as the run read them.
        """
        if not self.has_rows:
            raise nothing_held_out(self.asked.settings.model.name, self.run)
        data, tokenizer = self.settled.data, self.load_plan.tokenizer
        reporter.report(PhaseStarted(title=f"Reading {', '.join(data.dataset or ())}"))
        text = TextTokenizer(tokenizer=tokenizer.tokenizer, end_ids=tokenizer.end_ids, reporter=reporter)
        seed = self.settled.training.seed
        rows = read_rows(data, self.run, text, seed=seed, are_named=names_rows(self.asked))
        if data.loss_on == LossOn.ALL and (rows.data.table.has_pairs or rows.data.table.has_labels):
            raise DataError(
                "all tokens would be measured, and answers are compared, not prompts",
                hint="Leave --loss-on out, or give completions.",
                setting="data.loss_on",
            )
        _note_rows(rows, reporter)
        return rows

    def compared(self, rows: HeldOutRows, *, rows_per_baseline: int | None = None) -> ComparedRows | None:
        """Return the rows as answers that are compared; None of others.

        The baselines of KTO are of `rows_per_baseline` rows; if it is not given, of as many as a step of the run has.

        Raises:
            DataError: there is nothing to compare.
        """
        return ComparedRows.of_data(
            rows.data,
            rows_per_step=rows_per_baseline or self.settled.training.rows_per_step,
            longest_trained_tokens=0 if self.run is None else self.run.longest_tokens,
        )


def plan_evaluation(
    resolved: Resolved[EvaluateSettings], reporter: Reporter, read: Sequence[InferredSettings] = ()
) -> EvaluationPlan:
    """Find the model, settle how it is loaded, and check its weights' names and sizes, before any is read.

    `read` is how the rows are read, if not as in the training of the model.

    Raises:
        QloraError: of the type of the problem.
    """
    check_placement(resolved.settings)
    model = find(resolved.settings.model, reporter)
    run = trained_rows(model.source)
    settled = settle_load(resolved, model, reporter, [*inferred_from_rows(resolved, run), *read])
    load_plan = plan_outlined(model, settled.settings, reporter)
    check_weights(load_plan, reporter)
    return EvaluationPlan(asked=resolved, settled=settled.settings, outline=model, load_plan=load_plan, run=run)


def _note_rows(rows: HeldOutRows, reporter: Reporter) -> None:
    report = rows.data.report
    tokens = f"{report.tokens:,} tokens, {report.supervised_tokens:,} of them evaluated"
    reporter.report(
        Noted(message=f"{report.name}: {counted(report.rows_trained, 'row')} of {report.recognised}; {tokens}")
    )
    lost = [
        f"{report.name}: {counted(number, 'row')} {what}"
        for number, what in (
            (report.truncated_rows, f"truncated; {counted(report.supervised_tokens_lost, 'token')} not evaluated"),
            (report.dropped_rows, "longer than --max-length, dropped"),
            (report.rows_without_supervision, "without a token to evaluate"),
            (report.bad_rows, "that can't be used, skipped"),
        )
        if number
    ]
    for message in (*rows.data.notes, *lost, *rows.notes):
        reporter.report(Noted(level="warning", message=message))
