"""What a search costs: the steps of its trials, and their time where that of a step is predicted."""

from pathlib import Path

from qlora_cli.data.feeding.prepare import PreparedData
from qlora_cli.runs.run_result import PredictedTime
from qlora_cli.training.run_plan import SettledRun
from qlora_cli.tuning.trial_steps import TrialGrid
from qlora_cli.tuning.tuning_result import TunePlan

# Of the time of training the same tokens: forward without backward, which computes at least as much again.
SHARE_OF_FORWARD = 0.5


def plan_of(
    settled: SettledRun, grid: TrialGrid, rows: PreparedData, output: Path, predicted: PredictedTime | None
) -> TunePlan:
    """Return the plan of a search that measures each trial on `rows`."""
    num_eval_tokens = int(rows.lengths.sum())
    low = high = None
    if predicted is not None:
        train = settled.rows.train
        step_tokens = float(train.lengths.mean()) * settled.resolved.settings.training.rows_per_step
        measuring = SHARE_OF_FORWARD * num_eval_tokens / step_tokens  # in steps
        low = predicted.step_seconds_low * (grid.fewest_steps + measuring * (grid.fewest_trials + 1))
        high = predicted.step_seconds_high * (grid.most_steps + measuring * (grid.most_trials + 1))
    return TunePlan(
        model=settled.load_plan.source.name,
        dataset=settled.rows.train.report.name,
        output=output,
        learning_rates=grid.learning_rates,
        trial_steps=grid.rounds,
        run_steps=settled.num_steps,
        fewest_steps=grid.fewest_steps,
        most_steps=grid.most_steps,
        num_eval_rows=len(rows.lengths),
        num_eval_tokens=num_eval_tokens,
        step_seconds=predicted.step_seconds if predicted is not None else None,
        seconds_low=low,
        seconds_high=high,
    )
