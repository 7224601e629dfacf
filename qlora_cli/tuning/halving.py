"""Successive halving: rounds of ever longer trials, each of those rates that no other one clearly beats.

A rate is dropped when its held-out loss exceeds the lowest of its round by more than two standard errors of the
difference, paired by row, and at once when it diverges. Each trial is a whole short run with the schedule of the
run, so that a high rate is not judged before it has decayed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qlora_cli.errors import TrainingError
from qlora_cli.evaluating.paired_losses import LossesOfRows, judge
from qlora_cli.tuning.trial_steps import MOST_ADDED, TrialGrid, rate_beyond


@dataclass(frozen=True, kw_only=True)
class RateTrial:
    """A short run.

    Attributes:
        learning_rate: Its peak learning rate.
        num_steps: Its steps.
        rows: The losses of the held-out rows after it; None if training ended before, or they are not finite.
        diverged: Why it does not count, in words; None if it counts.
        seconds: The time of training and measuring.
    """

    learning_rate: float
    num_steps: int
    rows: LossesOfRows | None
    diverged: str | None
    seconds: float

    @property
    def loss(self) -> float:
        """The mean held-out loss; infinity if it diverged."""
        return math.inf if self.diverged is not None or self.rows is None else self.rows.loss


@dataclass(frozen=True, kw_only=True)
class Halving:
    """All trials, in the order in which they were asked for, and the one with the lowest loss of the longest ones.

    `is_at_edge` says that no rate beyond it was tried, on one side.
    """

    trials: tuple[RateTrial, ...]
    chosen: RateTrial
    is_at_edge: bool


def halve(grid: TrialGrid, run: Callable[[float, int], RateTrial]) -> Halving:
    """Run the trials of a grid; `run` takes a learning rate and a number of steps.

    Raises:
        TrainingError: every rate diverged.
    """
    trials: list[RateTrial] = []
    rates, longest = grid.learning_rates, grid.rounds[-1]
    for num_steps in grid.rounds:
        of_round = [run(rate, num_steps) for rate in rates]
        trials += of_round
        rates = surviving(of_round)
        if not rates:
            raise _all_diverged(of_round)
    tried = list(grid.learning_rates)
    for _ in range(MOST_ADDED if grid.extends else 0):
        beyond = rate_beyond(best_of(trials, longest).learning_rate, tried)
        if beyond is not None:
            tried.append(beyond)
            trials.append(run(beyond, longest))
    chosen = best_of(trials, longest)
    return Halving(trials=tuple(trials), chosen=chosen, is_at_edge=chosen.learning_rate in (min(tried), max(tried)))


def best_of(trials: Sequence[RateTrial], num_steps: int) -> RateTrial:
    """Return the trial of `num_steps` with the lowest loss, of equal ones that with the lowest rate."""
    of_round = [trial for trial in trials if trial.num_steps == num_steps]
    return min(of_round, key=lambda trial: (trial.loss, trial.learning_rate))


def surviving(of_round: Sequence[RateTrial]) -> tuple[float, ...]:
    """Return the rates that have not diverged and are not clearly worse than the best of their round."""
    best = min(of_round, key=lambda trial: trial.loss)
    return tuple(trial.learning_rate for trial in of_round if not is_worse(trial, best))


def is_worse(trial: RateTrial, best: RateTrial) -> bool:
    """Return whether a trial diverged, or its loss is above that of the best by more than two standard errors."""
    if trial.diverged is not None or trial.rows is None:
        return True
    assert best.rows is not None, "the best has the lowest loss, which is finite"
    return judge(trial.rows, best.rows, margin=0.0) == "worse"


def _all_diverged(trials: Sequence[RateTrial]) -> TrainingError:
    reasons = "; ".join(f"{trial.learning_rate:g}: {trial.diverged}" for trial in trials)
    return TrainingError(
        f"every learning rate diverged: {reasons}",
        hint="Try lower ones with --learning-rates, longer trials with --trial-steps, or look at the rows with "
        "qlora inspect-data.",
    )
