"""Which learning rates are tried, and for how many steps. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

# Of the rate that the run would have: the best one is more often above the default of 2e-4 than below it.
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
SHARE_OF_RUN = 4  # the longest trial has a quarter of the run's steps, between these two
LEAST_STEPS, MOST_STEPS = 16, 128
FEWEST_STEPS = 8  # of a trial: fewer say little about more
HALVINGS = 2
MOST_ADDED = 2  # rates beyond the default ones, if the best is at their edge


@dataclass(frozen=True, kw_only=True)
class TuneRequest:
    """What is asked for besides the settings of the run; None where the defaults are to be chosen."""

    learning_rates: tuple[float, ...] | None = None
    trial_steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrialGrid:
    """The learning rates, in ascending order, and the steps of each round of trials.

    `extends` says that a rate is added beyond the edge where the best one is.
    """

    learning_rates: tuple[float, ...]
    rounds: tuple[int, ...]
    extends: bool

    @property
    def fewest_steps(self) -> int:
        """The steps if only one rate is left after the first round."""
        return len(self.learning_rates) * self.rounds[0] + sum(self.rounds[1:])

    @property
    def most_steps(self) -> int:
        """The steps if no rate can be dropped, and as many are added as may be."""
        added = MOST_ADDED * self.rounds[-1] if self.extends else 0
        return len(self.learning_rates) * sum(self.rounds) + added

    @property
    def most_trials(self) -> int:
        """The number of trials then."""
        return len(self.learning_rates) * len(self.rounds) + (MOST_ADDED if self.extends else 0)

    @property
    def fewest_trials(self) -> int:
        """The number of trials if only one rate is left after the first round."""
        return len(self.learning_rates) + len(self.rounds) - 1


def grid_of(request: TuneRequest, *, learning_rate: float, run_steps: int) -> TrialGrid:
    """Return the trials for a run of `run_steps` that would have `learning_rate`."""
    longest = request.trial_steps or default_steps(run_steps)
    rates = request.learning_rates or tuple(rate for factor in FACTORS if (rate := factor * learning_rate) < 1)
    return TrialGrid(
        learning_rates=tuple(sorted(rates)), rounds=rounds_of(longest), extends=request.learning_rates is None
    )


def default_steps(run_steps: int) -> int:
    """Return the steps of the longest trial: a quarter of the run, within bounds, and never more than the run."""
    return min(run_steps, max(LEAST_STEPS, min(MOST_STEPS, -(-run_steps // SHARE_OF_RUN))))


def rounds_of(longest: int) -> tuple[int, ...]:
    """Return the steps of each round: a quarter, a half and all of `longest`, without those that say little."""
    parts = [-(-longest // 2**halvings) for halvings in range(HALVINGS, 0, -1)]
    return (*(steps for steps in parts if steps >= FEWEST_STEPS), longest)


def rate_beyond(chosen: float, tried: Sequence[float]) -> float | None:
    """Return the rate to try next if the chosen one is the lowest or the highest; None if it is neither."""
    if chosen == max(tried) and 2 * chosen < 1:
        return 2 * chosen
    return chosen / 2 if chosen == min(tried) else None
