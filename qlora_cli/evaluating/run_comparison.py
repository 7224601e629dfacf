"""Compare runs on the same held-out rows: losses paired by row, speed, memory, and the settings that differ."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from qlora_cli.errors import DataError
from qlora_cli.evaluating.answer_losses import ComparedBy
from qlora_cli.evaluating.comparison_result import ComparedRun, DifferingSetting, RunComparison
from qlora_cli.evaluating.evaluation_checks import names_rows
from qlora_cli.evaluating.judged_answers import JudgedRuns, MeasuredRun, how_rows_are_read, judge_answers
from qlora_cli.evaluating.paired_losses import LossesOfRows, judge
from qlora_cli.evaluating.run_losses import RunLosses, losses_of_run
from qlora_cli.evaluating.statistics import finite
from qlora_cli.events import Reporter
from qlora_cli.runs.find_runs import Run, read_run
from qlora_cli.runs.record import RecordedResult
from qlora_cli.settings.models import EvaluateSettings
from qlora_cli.settings.resolve import Resolved

OF_ROWS = ("data.", "model.chat_template", "training.seed")  # what decides which rows are held out, and their tokens
WITHOUT_EFFECT = ("output.",)  # on what is learnt


def compare(asked: Sequence[Resolved[EvaluateSettings]], margin: float, reporter: Reporter) -> RunComparison:
    """Compare runs, each asked for as `qlora evaluate` is; the first is the reference.

    Args:
        asked: For each run, its directory as the model, and the rows if they are named.
        margin: What a loss may exceed that of the reference by before it counts as worse.
        reporter: Shows progress.

    Raises:
        DataError: the runs did not hold out the same rows.
        QloraError: of the type of the problem with a run.
    """
    runs = [read_run(Path(one.settings.model.name)) for one in asked]
    by = [ComparedBy.of_record(run.record.settings.get("training", {})) for run in runs]
    read = how_rows_are_read(asked[0], [run.record for run in runs])
    losses = [
        losses_of_run(run, one, reporter, read=read, rows_per_baseline=by[0].rows_per_step)
        for run, one in zip(runs, asked, strict=True)
    ]
    reference = losses[0].rows
    for run, one in zip(runs[1:], losses[1:], strict=True):
        if not one.rows.has_rows_of(reference):
            raise _other_rows([runs[0], run], [reference, one.rows])
    judged = judge_answers(losses, by)
    compared = [
        _compared_run(run, one, rows, judged, margin)
        for run, one, rows in zip(runs, losses, judged.measured, strict=True)
    ]
    compared[0] = replace(
        compared[0],
        difference=None,
        difference_stderr=None,
        accuracy_difference=None,
        accuracy_difference_stderr=None,
        verdict="reference",
    )
    named = asked[0].settings.data.dataset if names_rows(asked[0]) else None
    return RunComparison(
        reference=runs[0].summary.path,
        dataset=", ".join(named) if named else _held_out_name(runs[0]),
        num_rows=len(reference.nll),
        num_tokens=int(reference.tokens.sum()),
        loss_of=judged.loss_of,
        margin=margin,
        is_worse=any(run.verdict == "worse" for run in compared),
        runs=tuple(compared),
        differing_settings=tuple(_differing_settings(runs)),
        notes=tuple(
            dict.fromkeys([*(note for one in losses for note in one.notes), *judged.notes, *_notes(runs, losses)])
        ),
    )


def _held_out_name(run: Run) -> str | None:
    return None if run.record.data.eval is None else run.record.data.eval.name


def _compared_run(
    run: Run, losses: RunLosses, measured: MeasuredRun, judged: JudgedRuns, margin: float
) -> ComparedRun:
    summary, rows, reference = run.summary, measured.losses, judged.measured[0].losses
    accuracy, of_first = measured.accuracy, judged.measured[0].accuracy
    result = run.record.result if run.record.result and losses.weights.is_result else RecordedResult()
    health = result.adapter_health
    return ComparedRun(
        path=summary.path,
        state=summary.state,
        step=losses.weights.step,
        loss=finite(rows.loss),
        loss_stderr=finite(rows.stderr),
        difference=finite(rows.loss - reference.loss),
        difference_stderr=finite(rows.stderr_of_difference(reference)),
        accuracy=None if accuracy is None else accuracy.loss,
        accuracy_stderr=None if accuracy is None else accuracy.stderr,
        accuracy_difference=accuracy.loss - of_first.loss if accuracy and of_first else None,
        accuracy_difference_stderr=accuracy.stderr_of_difference(of_first) if accuracy and of_first else None,
        num_rows_lower=int((rows.nll < reference.nll).sum()),
        num_rows_higher=int((rows.nll > reference.nll).sum()),
        verdict=judge(rows, reference, margin),
        was_measured=losses.was_measured,
        device=losses.device,
        compute_dtype=losses.compute_dtype,
        quantization=losses.quantization,
        tokens_per_second=summary.tokens_per_second,
        duration_seconds=summary.duration_seconds,
        peak_device_bytes=summary.peak_reserved_bytes,
        peak_host_bytes=summary.peak_host_bytes,
        adapter_rank=health.rank if health else None,
        effective_rank=finite(health.effective_rank) if health else None,
        relative_update_norm=finite(health.relative_norm) if health else None,
        forgetting=result.forgetting,
    )


def _other_rows(runs: Sequence[Run], rows: Sequence[LossesOfRows]) -> DataError:
    """Return the error for two runs with other held-out rows, with the settings that may be the reason."""
    first, second = (run.summary.path for run in runs)
    counts = " and ".join(f"{len(one.nll):,}" for one in rows)
    differing = [setting for setting in _differing_settings(runs) if setting.setting.startswith(OF_ROWS)]
    names = ", ".join(setting.setting for setting in differing)
    reason = f"; they differ in {names}" if differing else "; their data or their tokenizers differ"
    return DataError(
        f"{first} and {second} did not hold out the same rows: of {counts}, {rows[0].num_shared(rows[1]):,} have the "
        f"same tokens and labels{reason}",
        hint="Name the same rows for all with --dataset; --set data.max_length=… makes all read them alike.",
    )


def _differing_settings(runs: Sequence[Run]) -> Iterator[DifferingSetting]:
    used = [{setting.path: setting.value for setting in run.record.settings_used} for run in runs]
    for path in sorted(set().union(*used)):
        values = tuple(settings.get(path) for settings in used)
        if any(value != values[0] for value in values) and not path.startswith(WITHOUT_EFFECT):
            yield DifferingSetting(setting=path, values=values)


def _notes(runs: Sequence[Run], losses: Sequence[RunLosses]) -> Iterator[str]:
    """Yield what makes the figures less comparable than they look."""
    for run, one in zip(runs, losses, strict=True):
        if not one.weights.is_result:
            yield f"{run.summary.path}: {one.weights.sentence}"
    for what, values in (
        ("devices", {one.device for one in losses}),
        ("dtypes", {one.compute_dtype for one in losses}),
    ):
        if len(values) > 1:
            yield f"the losses were measured on different {what} ({', '.join(sorted(values))})"
    results = [run.record.result or RecordedResult() for run in runs]
    if len({result.forgetting.fingerprint for result in results if result.forgetting}) > 1:
        yield "the losses on general text are of different texts or tokenizers, and can't be compared"
    if len(losses[0].rows.nll) == 1:
        yield "a single row has no standard error: hold out more"
