"""The plan and the result of a search for the learning rate, in plain numbers. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_cli.units import counted, format_duration

TrialVerdict = Literal["best", "unclear", "worse", "diverged"]


@dataclass(frozen=True, kw_only=True)
class TunePlan:
    """What a search will cost. Times in seconds; None where the speed of the device is not known.

    Attributes:
        model, dataset, output: What is tuned, on what, and where the result will be.
        learning_rates: The rates of the first round, in ascending order.
        trial_steps: The steps of a trial, by round.
        run_steps: The steps of the run that it is for.
        fewest_steps: The steps if one rate is left after the first round.
        most_steps: The steps if none can be dropped and the best one is at the edge.
        num_eval_rows: The held-out rows that each trial is measured on.
        num_eval_tokens: All tokens of them.
        step_seconds: The predicted time of a step.
        seconds_low: For the fewest steps, by the low end of the prediction's band, with measuring.
        seconds_high: For the most steps, by the high end.
    """

    model: str
    dataset: str
    output: Path
    learning_rates: tuple[float, ...]
    trial_steps: tuple[int, ...]
    run_steps: int
    fewest_steps: int
    most_steps: int
    num_eval_rows: int
    num_eval_tokens: int
    step_seconds: float | None
    seconds_low: float | None
    seconds_high: float | None

    @property
    def sentence(self) -> str:
        """The cost in words."""
        steps = f"{self.fewest_steps:,} to {counted(self.most_steps, 'step')}"
        rates = f"{counted(len(self.learning_rates), 'learning rate')} in {steps} (the run has {self.run_steps:,})"
        if self.seconds_low is None or self.seconds_high is None:
            return f"{rates}; how long a step takes is not predicted here (qlora doctor --measure)"
        return f"{rates}: {format_duration(self.seconds_low)} to {format_duration(self.seconds_high)} predicted"


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """A trial next to the best one with as many steps.

    Attributes:
        learning_rate, num_steps: What was tried.
        loss: Mean negative log-likelihood of a trained token of the held-out rows, in nats; None if training ended
            before, or it is not finite.
        loss_stderr: Standard error of the loss, over rows; None for a single row.
        difference: The loss minus that of the best trial with as many steps; None for the best itself.
        difference_stderr: Standard error of the difference, paired by row.
        verdict: `best`; `worse` by more than two standard errors; `diverged`; otherwise `unclear`.
        reason: Why it diverged, in words.
        seconds: The time of training and measuring.
    """

    learning_rate: float
    num_steps: int
    loss: float | None
    loss_stderr: float | None
    difference: float | None
    difference_stderr: float | None
    verdict: TrialVerdict
    reason: str | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """The learning rate that was chosen, and by what.

    Attributes:
        learning_rate: The rate with the lowest loss after the longest trials.
        is_at_edge: Whether no rate beyond it was tried, on one side.
        start_loss: The loss of the held-out rows before training, in nats.
        settings_file: The settings of the run with this rate, for `qlora train --config`.
        page: The page with the chart.
        model, dataset, output: What was tuned, on what, and where the result is.
        num_eval_rows, num_eval_tokens: The held-out rows, and the trained tokens in them.
        run_steps: The steps of the run that it is for.
        trials: Each trial, in order.
        seconds: The time of all trials.
        notes: What helps to interpret the figures.
    """

    learning_rate: float
    is_at_edge: bool
    start_loss: float
    settings_file: Path
    page: Path
    model: str
    dataset: str
    output: Path
    num_eval_rows: int
    num_eval_tokens: int
    run_steps: int
    trials: tuple[TrialResult, ...]
    seconds: float
    notes: tuple[str, ...]
