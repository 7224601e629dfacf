"""Divide the rows of a step into micro-batches, by predicted time: one row each, or several that fill it.

Imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_cli.errors import QloraError
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import StepTime
from qlora_cli.memory.request import Predict
from qlora_cli.memory.run_batches import StepRows
from qlora_cli.settings.models import EstimateSettings, TrainingSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.settle import with_settings

MICRO_BATCH, MICRO_BATCH_TOKENS = "training.micro_batch_size", "training.micro_batch_tokens"
MAX_LENGTH = "data.max_length"
FACTORS = (1, 2, 4)  # of the tokens of the longest row, which take about as much memory in one row as in several
WORTHWHILE = 0.95  # of the time before, at most: the model of time does not know smaller gains
MIN_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Division:
    """A way to divide the rows of a step into micro-batches.

    Attributes:
        tokens: What they are filled up to; None for one row each.
        num_micro_batches: Those of a step, on average.
        share: The time of one of them on average, as a share of the largest one's.
    """

    tokens: int | None
    num_micro_batches: float
    share: float = 1.0

    @property
    def values(self) -> Mapping[str, object]:
        """The settings, by `section.key`."""
        return {MICRO_BATCH_TOKENS: self.tokens}

    def step_seconds(self, time: StepTime) -> float:
        """Return the seconds of a step on average; `time` is that of the largest micro-batch."""
        return self.num_micro_batches * self.share * time.micro_batch_seconds + time.update_seconds


def is_given(asked: Resolved[Any]) -> bool:
    """Return whether the user decides how rows are divided into micro-batches."""
    return any(asked.is_given(path) for path in (MICRO_BATCH, MICRO_BATCH_TOKENS))


def changes_results(training: TrainingSettings, *, is_packed: bool, balances_experts: bool) -> bool:
    """Return whether a step depends on how its rows are divided, or they are joined already."""
    return is_packed or balances_experts or training.neftune_noise_alpha is not None


def worthwhile_divisions(settings: EstimateSettings, gpu: Gpu, predict: Predict, rows: StepRows) -> Sequence[Division]:
    """Return one row a micro-batch and, each faster than the one before, larger micro-batches of several.

    The memory of the GPU does not matter. Empty if the time is not known. `settings` have one row a micro-batch, the
    longest of which has `longest_row_tokens`.
    """

    def seconds_with(values: Mapping[str, object]) -> float:
        time = predict(with_settings(settings, values), gpu).time
        return 0.0 if time is None else time.micro_batch_seconds

    longest, of_row = settings.longest_row_tokens, settings.training.objective.num_sequences
    try:
        of_longest = seconds_with({})
        if not of_longest:
            return []
        of_mean = seconds_with({MAX_LENGTH: max(MIN_TOKENS, round(rows.mean_tokens / of_row))})
        divisions = [Division(tokens=None, num_micro_batches=rows.num_rows, share=of_mean / of_longest)]
        best = rows.num_rows * of_mean
        for tokens in (factor * longest for factor in FACTORS):
            number = rows.num_filled(tokens)
            if number > WORTHWHILE * divisions[-1].num_micro_batches:
                continue
            of_full = seconds_with({MICRO_BATCH_TOKENS: tokens})
            of_average = _at_mean_fill(of_mean, of_full, rows, tokens)
            if number * of_average > WORTHWHILE * best:
                if number <= divisions[-1].num_micro_batches / 2:
                    break  # half as many passes saved next to nothing
                continue
            divisions.append(Division(tokens=tokens, num_micro_batches=number, share=of_average / of_full))
            best = number * of_average
    except QloraError:  # not with these settings
        return []
    return divisions


def _at_mean_fill(of_mean: float, of_full: float, rows: StepRows, tokens: int) -> float:
    """Return the seconds of a micro-batch of up to `tokens` that is filled as the average one of a step.

    They lie on the line from a row of the mean length, `of_mean`, to a full micro-batch, `of_full`.
    """
    num_tokens = rows.num_rows * rows.mean_tokens / rows.num_filled(tokens)
    filled = (num_tokens - rows.mean_tokens) / max(1.0, tokens - rows.mean_tokens)
    return of_mean + filled * (of_full - of_mean)
