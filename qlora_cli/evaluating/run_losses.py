"""The loss of each held-out row of a run: kept in its directory, or measured and then kept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_cli.errors import ModelError
from qlora_cli.evaluating.answer_losses import AnswerLosses, Values
from qlora_cli.evaluating.evaluation_checks import names_rows
from qlora_cli.evaluating.paired_losses import Digests, LossesOfRows
from qlora_cli.events import Noted, PhaseStarted, Reporter
from qlora_cli.model_files.digest import adapter_digest
from qlora_cli.runs.directory import LOSSES_FILE, RunDirectory
from qlora_cli.runs.find_runs import Run
from qlora_cli.runs.held_out_losses import HeldOutLosses, KeptAnswers, read_losses, write_losses
from qlora_cli.runs.run_weights import RunWeights, weights_of
from qlora_cli.settings.models import EvaluateSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.settle import InferredSettings

if TYPE_CHECKING:  # with torch
    from qlora_cli.evaluating.compared_rows import ComparedRows, Measure, MeasuredAnswers
    from qlora_cli.evaluating.evaluation_plan import EvaluationPlan
    from qlora_cli.loading.load_plan import LoadPlan


@dataclass(frozen=True, kw_only=True)
class RunLosses:
    """The losses of a run's weights on rows, and how they came about; `notes` are warnings about the rows.

    Of rows whose answers are compared, `rows` are the chosen or wanted answers by themselves, `answers` are all, and
    `digests` those of the rows, both in the order of the data.
    """

    weights: RunWeights
    rows: LossesOfRows
    digests: Digests
    answers: AnswerLosses | None
    device: str
    compute_dtype: str
    quantization: str
    was_measured: bool
    notes: tuple[str, ...] = ()

    def by_row(self, values: Values) -> LossesOfRows:
        """Return a figure of each row, `(rows,)` in the order of the data, as losses that are means over rows."""
        return LossesOfRows.in_order(self.digests, values, np.ones(len(values), np.int64))


def losses_of_run(
    run: Run,
    asked: Resolved[EvaluateSettings],
    reporter: Reporter,
    *,
    read: Sequence[InferredSettings],
    rows_per_baseline: int,
) -> RunLosses:
    """Return the loss of each row that a run held out, or that were named.

    `read` is how they are read, where that is not as in the training of the run; `rows_per_baseline` the number of
    answers with labels whose mean gain is a baseline.

    Raises:
        ModelError: the run has no weights.
        QloraError: what an evaluation raises.
    """
    directory = RunDirectory(run.summary.path)
    weights = weights_of(directory, run.record)
    rows = run.record.data.eval
    if rows is not None and not names_rows(asked):
        kept = read_losses(directory, fingerprint=rows.fingerprint, weights=adapter_digest(weights.path))
        if kept is not None and _has_baseline_of(kept, rows_per_baseline):
            return _losses(weights, kept, was_measured=False)
    from qlora_cli.evaluating.evaluation_plan import plan_evaluation  # with torch

    return _measure(directory, weights, plan_evaluation(asked, reporter, read), reporter, rows_per_baseline)


def _has_baseline_of(kept: HeldOutLosses, rows_per_baseline: int) -> bool:
    return kept.answers is None or kept.answers.rows_per_baseline in (None, rows_per_baseline)


def _losses(weights: RunWeights, kept: HeldOutLosses, *, was_measured: bool) -> RunLosses:
    digests, tokens = (np.array(values, np.int64) for values in (kept.row_digests, kept.row_tokens))
    return RunLosses(
        weights=weights,
        rows=LossesOfRows.in_order(digests, np.array(kept.row_nll, np.float64), tokens),
        digests=digests,
        answers=None if kept.answers is None else _answers(kept.answers),
        device=kept.device,
        compute_dtype=kept.compute_dtype,
        quantization=kept.quantization,
        was_measured=was_measured,
    )


def _answers(kept: KeptAnswers) -> AnswerLosses:
    def array(values: tuple[float, ...] | None) -> Values | None:
        return None if values is None else np.array(values, np.float64)

    return AnswerLosses(
        nll=np.array(kept.nll, np.float64),
        tokens=np.array(kept.tokens, np.int64),
        reference_nll=array(kept.reference_nll),
        is_desirable=None if kept.is_desirable is None else np.array(kept.is_desirable, np.bool_),
        gain=array(kept.gain),
        rows_per_baseline=kept.rows_per_baseline,
    )


def _kept_answers(answers: AnswerLosses) -> KeptAnswers:
    arrays = {key: value for key, value in vars(answers).items() if isinstance(value, np.ndarray)}
    lists = {key: tuple(value.tolist()) for key, value in arrays.items()}
    return KeptAnswers(**{**vars(answers), **lists})


def _measure(
    directory: RunDirectory,
    weights: RunWeights,
    plan: "EvaluationPlan",
    reporter: Reporter,
    rows_per_baseline: int,
) -> RunLosses:
    from qlora_cli.evaluating.losses import measure_losses
    from qlora_cli.loading.loader import load_planned

    if plan.load_plan.source.adapter is None:
        raise ModelError(f"{directory.path} has no adapter", hint="Name a run of qlora train.")
    rows = plan.read_rows(reporter)
    loaded = load_planned(plan.load_plan, reporter)
    reporter.report(PhaseStarted(title=f"Evaluating {directory.path}"))
    measure = partial(
        measure_losses,
        loaded.model,
        pad_token_id=loaded.tokenizer.pad_token_id,
        dtype=loaded.dtype.torch_dtype,
        batch_size=plan.settled.evaluate.batch_size,
        title=str(directory.path),
        reporter=reporter,
    )
    compared, answers = plan.compared(rows, rows_per_baseline=rows_per_baseline), None
    if compared is None:
        losses = measure(rows.data)
        nll, tokens = losses.nll, losses.tokens
    else:
        with_adapter = compared.measure(measure)
        answers = compared.losses(with_adapter, _measured_base(loaded.model, plan.load_plan, compared, measure))
        nll, tokens = answers.rows_of_chosen
    measured = HeldOutLosses(
        fingerprint=rows.data.report.fingerprint,
        weights=adapter_digest(weights.path),
        device=str(plan.load_plan.device),
        compute_dtype=loaded.dtype.name.value,
        quantization=loaded.settings.quantization.method.value,
        row_digests=tuple(rows.data.table.truncated_digest[rows.data.selected].tolist()),
        row_nll=tuple(nll.tolist()),
        row_tokens=tuple(tokens.tolist()),
        answers=None if answers is None else _kept_answers(answers),
    )
    if not names_rows(plan.asked) and measured.is_finite:
        _keep(directory, measured, reporter)
    return replace(_losses(weights, measured, was_measured=True), notes=rows.notes)


def _measured_base(
    model: Any, load_plan: "LoadPlan", compared: "ComparedRows", measure: "Measure"
) -> "MeasuredAnswers | None":
    """Return the answers by the base; None if an adapter that is switched off does not leave it."""
    from qlora_cli.adapters.initialization import base_change

    if load_plan.adapter is None or base_change(load_plan.adapter.lora) is not None:
        return None
    with model.disable_adapter():
        return compared.measure(measure)


def _keep(directory: RunDirectory, losses: HeldOutLosses, reporter: Reporter) -> None:
    try:
        write_losses(directory, losses)
    except OSError as error:  # such as a run of somebody else: the losses are measured again next time
        message = f"{directory.path / LOSSES_FILE} can't be written: {error.strerror}"
        reporter.report(Noted(level="warning", message=message))
