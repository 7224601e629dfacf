"""The order of rows in an epoch and the micro-batches that they make, as the settings of a run decide them."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from qlora_cli.data.feeding.order import padding_share, row_order
from qlora_cli.data.feeding.packing import fill_micro_batches
from qlora_cli.data.feeding.token_table import Numbers
from qlora_cli.settings.models import TrainingSettings


def epoch_order(lengths: Numbers, training: TrainingSettings, epoch: int = 0) -> list[int]:
    """Return the order in which one epoch feeds rows of these lengths, in tokens."""
    return row_order(
        lengths,
        training.sampling,
        batch_rows=training.rows_per_step,
        longest_first=training.longest_first,
        seed=training.seed,
        epoch=epoch,
    )


def micro_batches_of_step(rows: Sequence[int], lengths: Numbers, training: TrainingSettings) -> list[list[int]]:
    """Return the rows of each micro-batch of a step that feeds `rows`; `lengths` are those of all rows, in tokens."""
    tokens, size = training.micro_batch_tokens, training.micro_batch_size
    if tokens is None:
        return [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    return [[rows[place] for place in places] for places in fill_micro_batches(lengths[list(rows)], tokens)]


def micro_batch_tokens(
    lengths: Numbers, training: TrainingSettings, *, num_steps: int, is_packed: bool
) -> Counter[int]:
    """Return how many micro-batches of a run of `num_steps` have how many tokens, padding included.

    `lengths` are those of the rows that are fed, int64 `(rows,)`; `is_packed`: they are joined, not padded.
    """
    is_joined = is_packed or training.micro_batch_tokens is not None
    sizes: Counter[int] = Counter()
    for step in _steps(lengths, training, num_steps):
        for rows in micro_batches_of_step(step, lengths, training):
            own = lengths[rows]
            sizes[int(own.sum()) if is_joined else int(own.max()) * len(rows)] += 1
    return sizes


def _steps(lengths: Numbers, training: TrainingSettings, num_steps: int) -> Iterator[list[int]]:
    """Yield the rows of each step, epoch after epoch."""
    size = training.rows_per_step
    steps_per_epoch = math.ceil(len(lengths) / size)
    for epoch in range(math.ceil(num_steps / steps_per_epoch)):
        order = epoch_order(lengths, training, epoch)
        for step in range(min(steps_per_epoch, num_steps - epoch * steps_per_epoch)):
            yield order[step * size : (step + 1) * size]


def padding_of_epoch(lengths: Numbers, training: TrainingSettings, *, is_packed: bool) -> float:
    """Return the share of pad tokens in the first epoch; rows that are joined have none."""
    if is_packed or training.micro_batch_tokens is not None:
        return 0.0
    return padding_share(lengths, epoch_order(lengths, training), training.micro_batch_size)
