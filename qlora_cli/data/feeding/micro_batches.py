"""The order of rows in an epoch and the micro-batches that they make, as the settings of a run decide them."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

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


def shares_of_step(lengths: Numbers, training: TrainingSettings) -> list[list[list[int]]]:
    """Return the micro-batches of each process in a step whose rows have these lengths, as positions in the step.

    Processes get about as many tokens each, padding included; one may get none.
    """
    tokens, size = training.micro_batch_tokens, training.micro_batch_size
    if tokens is not None:
        shares = balance(lengths, training.num_gpus)
        return [[[own[at] for at in places] for places in fill_micro_batches(lengths[own], tokens)] for own in shares]
    places = [list(range(start, min(start + size, len(lengths)))) for start in range(0, len(lengths), size)]
    padded = np.array([lengths[rows].max() * len(rows) for rows in places])
    return [[places[at] for at in own] for own in balance(padded, training.num_gpus)]


def balance(weights: Numbers, num_shares: int) -> list[list[int]]:
    """Return the positions of each share, ascending, so that the weights of the heaviest share are small.

    The heaviest goes first, each to the lightest share so far: at most 4/3 of the best (R. L. Graham, 1969).
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    totals = [0] * num_shares
    for place in np.argsort(-weights, kind="stable"):
        lightest = totals.index(min(totals))
        shares[lightest].append(int(place))
        totals[lightest] += int(weights[place])
    return [sorted(share) for share in shares]


def micro_batches_of_step(rows: Sequence[int], lengths: Numbers, training: TrainingSettings) -> list[list[int]]:
    """Return the rows of each micro-batch of a step that feeds `rows`, process by process.

    `lengths` are those of all rows, in tokens.
    """
    shares = shares_of_step(lengths[list(rows)], training)
    return [[rows[place] for place in places] for share in shares for places in share]


def micro_batch_tokens(
    lengths: Numbers,
    training: TrainingSettings,
    *,
    num_steps: int,
    is_packed: bool,
    padded_lengths: Numbers | None = None,
) -> Counter[int]:
    """Return how many micro-batches of a run of `num_steps` have how many tokens, padding included.

    With several processes, they are those of the one that has most to do in each step. `lengths` are those of the rows
    that are fed, int64 `(rows,)`; `is_packed`: they are joined, not padded. `padded_lengths` are what they take where
    they are padded, if that is not their length: see `PreparedData`.
    """
    is_joined = is_packed or training.micro_batch_tokens is not None
    sizes: Counter[int] = Counter()
    for step in _steps(lengths, training, num_steps):
        of_step = lengths[step]
        padded = of_step if padded_lengths is None else padded_lengths[step]
        shares = [
            [int(of_step[rows].sum()) if is_joined else int(padded[rows].max()) * len(rows) for rows in share]
            for share in shares_of_step(of_step, training)
        ]
        sizes.update(max(shares, key=sum))
    return sizes


def _steps(lengths: Numbers, training: TrainingSettings, num_steps: int) -> Iterator[list[int]]:
    """Yield the rows of each step, epoch after epoch."""
    size = training.rows_per_step
    steps_per_epoch = math.ceil(len(lengths) / size)
    for epoch in range(math.ceil(num_steps / steps_per_epoch)):
        order = epoch_order(lengths, training, epoch)
        for step in range(min(steps_per_epoch, num_steps - epoch * steps_per_epoch)):
            yield order[step * size : (step + 1) * size]


def padding_of_epoch(
    lengths: Numbers, training: TrainingSettings, *, is_packed: bool, padded_lengths: Numbers | None = None
) -> float:
    """Return the share of pad tokens in the first epoch; rows that are joined have none.

    `lengths` and `padded_lengths` are as in `micro_batch_tokens`.
    """
    if is_packed or training.micro_batch_tokens is not None:
        return 0.0
    return padding_share(lengths, epoch_order(lengths, training), training.micro_batch_size, padded_lengths)
