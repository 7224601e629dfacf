"""The loss of each held-out row of a run: kept in its directory, or measured and then kept."""

from dataclasses import dataclass, replace

import numpy as np

from qlora_cli.errors import ModelError
from qlora_cli.evaluating.evaluation_checks import names_rows
from qlora_cli.evaluating.paired_losses import LossesOfRows
from qlora_cli.events import Noted, PhaseStarted, Reporter
from qlora_cli.model_files.digest import adapter_digest
from qlora_cli.runs.directory import LOSSES_FILE, RunDirectory
from qlora_cli.runs.find_runs import Run
from qlora_cli.runs.held_out_losses import HeldOutLosses, read_losses, write_losses
from qlora_cli.runs.run_weights import RunWeights, weights_of
from qlora_cli.settings.models import EvaluateSettings
from qlora_cli.settings.resolve import Resolved


@dataclass(frozen=True, kw_only=True)
class RunLosses:
    """The losses of a run's weights on rows, and how they came about; `notes` are warnings about the rows."""

    weights: RunWeights
    rows: LossesOfRows
    device: str
    compute_dtype: str
    quantization: str
    was_measured: bool
    notes: tuple[str, ...] = ()


def losses_of_run(run: Run, asked: Resolved[EvaluateSettings], reporter: Reporter) -> RunLosses:
    """Return the loss of each row that a run held out, or that were named.

    Raises:
        ModelError: the run has no weights.
        QloraError: what an evaluation raises.
    """
    directory = RunDirectory(run.summary.path)
    weights = weights_of(directory, run.record)
    rows = run.record.data.eval
    if rows is not None and not names_rows(asked):
        kept = read_losses(directory, fingerprint=rows.fingerprint, weights=adapter_digest(weights.path))
        if kept is not None:
            return _losses(weights, kept, was_measured=False)
    return _measure(directory, weights, asked, reporter)


def _losses(weights: RunWeights, kept: HeldOutLosses, *, was_measured: bool) -> RunLosses:
    digests, tokens = (np.array(values, np.int64) for values in (kept.row_digests, kept.row_tokens))
    return RunLosses(
        weights=weights,
        rows=LossesOfRows.in_order(digests, np.array(kept.row_nll, np.float64), tokens),
        device=kept.device,
        compute_dtype=kept.compute_dtype,
        quantization=kept.quantization,
        was_measured=was_measured,
    )


def _measure(
    directory: RunDirectory, weights: RunWeights, asked: Resolved[EvaluateSettings], reporter: Reporter
) -> RunLosses:
    from qlora_cli.evaluating.evaluation_plan import plan_evaluation  # with torch
    from qlora_cli.evaluating.losses import measure_losses
    from qlora_cli.loading.loader import load_planned

    plan = plan_evaluation(asked, reporter)
    if plan.load_plan.source.adapter is None:
        raise ModelError(f"{directory.path} has no adapter", hint="Name a run of qlora train.")
    rows = plan.read_rows(reporter)
    loaded = load_planned(plan.load_plan, reporter)
    reporter.report(PhaseStarted(title=f"Evaluating {directory.path}"))
    losses = measure_losses(
        loaded.model,
        rows.data,
        pad_token_id=loaded.tokenizer.pad_token_id,
        dtype=loaded.dtype.torch_dtype,
        batch_size=plan.settled.evaluate.batch_size,
        title=str(directory.path),
        reporter=reporter,
    )
    measured = HeldOutLosses(
        fingerprint=rows.data.report.fingerprint,
        weights=adapter_digest(weights.path),
        device=str(plan.load_plan.device),
        compute_dtype=loaded.dtype.name.value,
        quantization=loaded.settings.quantization.method.value,
        row_digests=tuple(rows.data.table.truncated_digest[rows.data.selected].tolist()),
        row_nll=tuple(losses.nll.tolist()),
        row_tokens=tuple(losses.tokens.tolist()),
    )
    if not names_rows(asked) and np.isfinite(losses.nll).all():
        _keep(directory, measured, reporter)
    return replace(_losses(weights, measured, was_measured=True), notes=rows.notes)


def _keep(directory: RunDirectory, losses: HeldOutLosses, reporter: Reporter) -> None:
    try:
        write_losses(directory, losses)
    except OSError as error:  # such as a run of somebody else: the losses are measured again next time
        message = f"{directory.path / LOSSES_FILE} can't be written: {error.strerror}"
        reporter.report(Noted(level="warning", message=message))
