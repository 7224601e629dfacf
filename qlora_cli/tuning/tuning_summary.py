"""The result of a search: each trial next to the best of its round, and what to think of it. Imports no torch."""

from collections.abc import Iterator, Sequence

from qlora_cli.evaluating.statistics import finite
from qlora_cli.tuning.halving import Halving, RateTrial, best_of, is_worse
from qlora_cli.tuning.tuning_record import PAGE_FILE, SETTINGS_FILE, TuneRecord
from qlora_cli.tuning.tuning_result import TrialResult, TrialVerdict, TunePlan, TuneResult


def result_of(halving: Halving, plan: TunePlan, record: TuneRecord) -> TuneResult:
    """Return the result of a search whose trials are in `record`."""
    trials = tuple(trial_result(trial, best_of(halving.trials, trial.num_steps)) for trial in halving.trials)
    return TuneResult(
        learning_rate=halving.chosen.learning_rate,
        is_at_edge=halving.is_at_edge,
        start_loss=record.start.loss,
        settings_file=plan.output / SETTINGS_FILE,
        page=plan.output / PAGE_FILE,
        model=plan.model,
        dataset=plan.dataset,
        output=plan.output,
        num_eval_rows=len(record.row_tokens),
        num_eval_tokens=sum(record.row_tokens),
        run_steps=plan.run_steps,
        trials=trials,
        seconds=sum(trial.seconds for trial in trials),
        notes=tuple(_notes(halving, trials, plan, record.start.loss)),
    )


def trial_result(trial: RateTrial, best: RateTrial) -> TrialResult:
    """Return the figures of a trial, and its difference from the best one with as many steps."""
    rows, reference = trial.rows, best.rows
    is_compared = rows is not None and reference is not None and trial is not best
    return TrialResult(
        learning_rate=trial.learning_rate,
        num_steps=trial.num_steps,
        loss=finite(rows.loss) if rows is not None else None,
        loss_stderr=finite(rows.stderr) if rows is not None else None,
        difference=finite(rows.loss - reference.loss) if is_compared and rows and reference else None,
        difference_stderr=finite(rows.stderr_of_difference(reference)) if is_compared and rows and reference else None,
        verdict=_verdict(trial, best),
        reason=trial.diverged,
        seconds=trial.seconds,
    )


def _verdict(trial: RateTrial, best: RateTrial) -> TrialVerdict:
    if trial.diverged is not None:
        return "diverged"
    if trial is best:
        return "best"
    return "worse" if is_worse(trial, best) else "unclear"


def _notes(halving: Halving, trials: Sequence[TrialResult], plan: TunePlan, start_loss: float) -> Iterator[str]:
    chosen = halving.chosen
    if chosen.loss >= start_loss:
        yield "no rate lowers the held-out loss in so few steps: try longer trials with --trial-steps"
    longest = [trial for trial in trials if trial.num_steps == chosen.num_steps]
    if tied := sorted(trial.learning_rate for trial in longest if trial.verdict == "unclear"):
        rates = ", ".join(f"{rate:g}" for rate in tied)
        yield f"within two standard errors of it: {rates}; more held-out rows or longer trials may tell them apart"
    if halving.is_at_edge:
        yield f"{chosen.learning_rate:g} is at the edge of what was tried: a rate beyond it may be better"
    if chosen.num_steps < plan.run_steps:
        yield (
            f"trials had {chosen.num_steps:,} of the run's {plan.run_steps:,} steps; the best rate of a longer run is "
            "the same or somewhat lower"
        )
    if chosen.rows is not None and len(chosen.rows.nll) == 1:
        yield "a single row has no standard error, so no rate was dropped for its loss: hold out more"
