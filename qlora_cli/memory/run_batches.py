"""The micro-batches of a whole run, by their tokens: of rows that were read, or of rows of one length.

Imports no torch.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil

from qlora_cli.errors import UsageError
from qlora_cli.memory.prediction import DataSummary
from qlora_cli.settings.models import EstimateSettings, PredictionSettings, TrainingSettings
from qlora_cli.settings.settle import with_settings

LENGTH, FILLED = "data.max_length", "training.micro_batch_tokens"
MIN_LENGTH = 8  # the least that data.max_length takes


@dataclass(frozen=True, kw_only=True)
class RunBatches:
    """The micro-batches of a whole run.

    Attributes:
        num_steps: Its optimizer steps.
        by_tokens: Numbers of tokens of a micro-batch, padding included, each with how many of them there are.
    """

    num_steps: int
    by_tokens: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """The rows of a step, on average over the steps of a run.

    Attributes:
        num_rows: Rows of a step.
        mean_tokens: Tokens of a row.
        num_filled: Returns the number of micro-batches of a step that have up to so many tokens each.
    """

    num_rows: float
    mean_tokens: float
    num_filled: Callable[[int], float]


@dataclass(frozen=True, kw_only=True)
class FedRows:
    """The rows of a data set as a run with certain micro-batches feeds them."""

    batches: RunBatches
    summary: DataSummary


@dataclass(frozen=True, kw_only=True)
class ReadRows:
    """What a prediction needs of the rows of a data set.

    Attributes:
        digest: Of all lengths, and what decides the order of rows.
        num_rows: Rows that are trained on.
        longest_tokens: Tokens of the longest one that is fed, trained or held out.
        average_step: Returns the rows of a step on average.
        feed: Returns the rows as they are fed.
    """

    digest: str
    num_rows: int
    longest_tokens: int
    average_step: Callable[[TrainingSettings], StepRows]
    feed: Callable[[TrainingSettings], FedRows]


def run_batches(settings: EstimateSettings, asked: PredictionSettings) -> RunBatches | None:
    """Return the micro-batches of a run over `asked.rows` rows of one length; None if their number was not given.

    Of several processes, they are those of the one that has most. Packed rows have the full length; rows that fill
    micro-batches are divided evenly among those of a step.

    Raises:
        UsageError: rows are longer on average than the longest may be.
    """
    if asked.rows is None:
        return None
    longest, training, num_rows = settings.longest_row_tokens, settings.training, asked.rows
    tokens = _mean_tokens(settings, asked)
    if settings.data.packing:
        num_rows, tokens = ceil(num_rows * tokens / longest), longest
    num_steps = training.num_steps(num_rows)
    num_epochs = num_steps / training.steps_per_epoch(num_rows)
    if training.micro_batch_tokens is None:
        size = training.micro_batch_size
        of_process = training.micro_batches_per_process / training.gradient_accumulation_steps
        return _batches(num_steps, [(size * tokens, num_epochs * ceil(num_rows / size) * of_process)])
    rows_per_step = min(training.rows_per_step, num_rows)
    num_joined = max(1, training.micro_batch_tokens // tokens)
    num_full_steps = num_epochs * num_rows / rows_per_step
    num_whole, rest = divmod(ceil(rows_per_step / training.num_gpus), num_joined)
    return _batches(
        num_steps, [(num_joined * tokens, num_full_steps * num_whole), (rest * tokens, num_full_steps * (rest > 0))]
    )


def average_step(settings: EstimateSettings, asked: PredictionSettings) -> StepRows | None:
    """Return the rows of a step of a run over `asked.rows` rows of one length; None if their number was not given.

    Raises:
        UsageError: rows are longer on average than the longest may be.
    """
    if asked.rows is None:
        return None
    of_step, mean = min(settings.training.rows_per_step, asked.rows), _mean_tokens(settings, asked)
    num_rows = ceil(of_step / settings.training.num_gpus)
    return StepRows(
        num_rows=num_rows, mean_tokens=mean, num_filled=lambda tokens: ceil(num_rows / max(1, tokens // mean))
    )


def _mean_tokens(settings: EstimateSettings, asked: PredictionSettings) -> int:
    longest = settings.longest_row_tokens
    if asked.mean_tokens is not None and asked.mean_tokens > longest:
        raise UsageError(
            f"{asked.mean_tokens:,} is more than the {longest:,} tokens that a row may have",
            hint="Rows are truncated there: give --max-length as well, or fewer --mean-tokens.",
            setting="inspect_memory.mean_tokens",
        )
    return longest if asked.mean_tokens is None else asked.mean_tokens


def _batches(num_steps: int, sizes: Iterable[tuple[int, float]]) -> RunBatches:
    by_tokens = Counter({tokens: ceil(number) for tokens, number in sizes if number})
    return RunBatches(num_steps=num_steps, by_tokens=tuple(sorted(by_tokens.items())))


def with_longest(settings: EstimateSettings, rows: ReadRows | None) -> EstimateSettings:
    """Return the settings with the length of the longest row that was read, as `train` predicts its memory."""
    return settings if rows is None else with_settings(settings, {LENGTH: max(MIN_LENGTH, rows.longest_tokens)})


def with_tokens(settings: EstimateSettings, tokens: int) -> EstimateSettings:
    """Return the settings of a run whose micro-batches have so many tokens, padding included."""
    training, of_row = settings.training, settings.training.objective.num_sequences
    if training.micro_batch_tokens is None:
        of_batch = training.micro_batch_size * of_row
        return with_settings(settings, {LENGTH: max(MIN_LENGTH, ceil(tokens / of_batch))})
    tokens = max(MIN_LENGTH, tokens)
    length = min(settings.data.max_length, max(MIN_LENGTH, tokens // of_row))
    return with_settings(settings, {LENGTH: length, FILLED: tokens})
