"""The rows of each micro-batch: made into a batch, named when something is wrong; and the largest ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_cli.data.feeding.collate import make_collator
from qlora_cli.data.feeding.prepare import PreparedData
from qlora_cli.loss.chunked_loss import trained_tokens
from qlora_cli.settings.models import TrainingSettings
from qlora_cli.training.data_order import RowOrder

MOST_NAMED = 16
Row = dict[str, Any]
Batch = dict[str, Any]


class BatchCollator:
    """Makes a micro-batch of rows: TRL's, and what the loss would otherwise have to read from the device.

    Besides the tensors of `make_collator`, it has `trained_positions` and `trained_targets`, see `trained_tokens`, and
    `num_tokens`, the number of its tokens without padding.
    """

    def __init__(self, pad_token_id: int | None, *, packing: bool) -> None:
        self._collate = make_collator(pad_token_id, packing=packing)

    def __call__(self, rows: list[Row]) -> Batch:
        """Return the micro-batch."""
        batch: Batch = self._collate(rows)
        positions, targets = trained_tokens(batch["labels"])
        num_tokens = sum(len(row["input_ids"]) for row in rows)
        return {**batch, "trained_positions": positions, "trained_targets": targets, "num_tokens": num_tokens}


@dataclass(frozen=True)
class Batches:
    """The micro-batches of a run, by step and index in it, in the order of `RowOrder`."""

    data: PreparedData
    settings: TrainingSettings
    max_length: int
    is_packed: bool

    def name_rows(self, step: int, micro_batch: int) -> tuple[str, ...]:
        """Return file and number of the rows of a micro-batch; steps and indices count from 0."""
        if self.data.stream is not None:
            return (f"micro-batch {micro_batch + 1} of step {step + 1} of the stream",)
        indices = self._indices(step, micro_batch)
        rows = [row for index in indices for row in self._rows_at(index)]
        named = [self.data.table.where(int(self.data.selected[row])) for row in rows[:MOST_NAMED]]
        return tuple(named if len(rows) == len(named) else [*named, f"and {len(rows) - len(named)} more"])

    def largest(self, num_epochs: float) -> list[Row]:
        """Return the micro-batch that needs most memory: of all epochs, the one with most tokens, padding included.

        For a stream, whose rows are not known, return rows of `max_length`.
        """
        size = self.settings.micro_batch_size
        if self.data.stream is not None:
            return [self._repeated(self.data.dataset[0])] * size
        best: Sequence[int] = ()
        most = (0, 0)
        for epoch in range(max(1, int(np.ceil(num_epochs)))):
            order = np.array(list(self._order(epoch)))
            starts = np.arange(0, len(order), size)
            longest = np.maximum.reduceat(self.data.lengths[order], starts)
            counts = np.minimum(size, len(order) - starts)
            largest = int(np.lexsort((longest, longest * counts))[-1])
            candidate = (int(longest[largest] * counts[largest]), int(longest[largest]))
            if candidate > most:
                most, best = candidate, order[starts[largest] :][:size].tolist()
        return [self.data.dataset[int(index)] for index in best]

    def _repeated(self, row: Row) -> Row:
        length = self.max_length
        stretched = {name: (list(row[name]) * length)[:length] for name in ("input_ids", "labels")}
        return {**stretched, "seq_lengths": [length]} if self.is_packed else stretched

    def _order(self, epoch: int) -> RowOrder:
        return RowOrder(self.data.lengths, self.settings, epoch)

    def _indices(self, step: int, micro_batch: int) -> list[int]:
        size, accumulated = self.settings.micro_batch_size, self.settings.gradient_accumulation_steps
        steps_per_epoch = -(-len(self.data.lengths) // (size * accumulated))
        epoch, step_of_epoch = divmod(step, steps_per_epoch)
        start = step_of_epoch * size * accumulated + micro_batch * size
        return list(self._order(epoch))[start : start + size]

    def _rows_at(self, index: int) -> list[int]:
        """Return the rows at one index of the data set: several if they are packed."""
        row = self.data.dataset.with_format(None)[int(index)]
        return list(row["rows"]) if "rows" in row else [int(index)]


def largest_held_out(data: PreparedData, size: int) -> list[Row]:
    """Return the micro-batch of an evaluation, in the order of the rows, that needs most memory."""
    starts = range(0, len(data.lengths), size)
    most = max(
        starts, key=lambda start: int(data.lengths[start : start + size].max()) * len(data.lengths[start:][:size])
    )
    return [data.dataset[index] for index in range(most, min(most + size, len(data.lengths)))]
