"""The order in which rows are fed, and the share of padding in their batches."""

import numpy as np
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from qlora_cli.data.feeding.token_table import Numbers
from qlora_cli.settings.choices import Sampling


def row_order(
    lengths: Numbers, sampling: Sampling, *, batch_rows: int, longest_first: bool, seed: int, epoch: int = 0
) -> list[int]:
    """Return the order of the rows in one epoch, determined by `seed` and `epoch`; a step has `batch_rows` rows."""
    rng = torch.Generator().manual_seed(seed + epoch)
    order: list[int]
    if sampling == Sampling.GROUP_BY_LENGTH:
        order = get_length_grouped_indices(lengths.tolist(), batch_rows, generator=rng)
    elif sampling == Sampling.SEQUENTIAL:
        order = list(range(len(lengths)))
    else:
        order = torch.randperm(len(lengths), generator=rng).tolist()
    if not longest_first:
        return order
    longest = np.argsort(-lengths, kind="stable")[:batch_rows].tolist()
    is_moved = set(longest)
    return [*longest, *(row for row in order if row not in is_moved)]


def padding_share(
    lengths: Numbers, order: list[int], micro_batch_size: int, padded_lengths: Numbers | None = None
) -> float:
    """Return the share of pad tokens when rows are fed in this order, each micro-batch as long as its longest row.

    `lengths` are those of the rows, and `padded_lengths` what each takes of a micro-batch of its own, if that is more.
    """
    if not order:
        return 0.0
    fed = (lengths if padded_lengths is None else padded_lengths)[np.asarray(order)]
    padded = sum(
        int(batch.max()) * len(batch)
        for batch in (fed[i : i + micro_batch_size] for i in range(0, len(fed), micro_batch_size))
    )
    return 1 - int(lengths[np.asarray(order)].sum()) / padded
