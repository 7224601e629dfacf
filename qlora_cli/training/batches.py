"""The rows of each micro-batch: made into a batch, named when something is wrong; and the largest ones."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_cli.data.feeding.collate import make_collator
from qlora_cli.data.feeding.known_values import host_copies, with_known_values
from qlora_cli.data.feeding.micro_batches import balance, epoch_order, micro_batches_of_step, shares_of_step
from qlora_cli.data.feeding.packing import fill_micro_batches
from qlora_cli.data.feeding.prepare import PreparedData
from qlora_cli.data.feeding.token_table import Numbers
from qlora_cli.data.rows.examples import IGNORE_INDEX
from qlora_cli.loss.chunked_loss import trained_tokens
from qlora_cli.memory.run_batches import StepRows
from qlora_cli.settings.models import TrainingSettings
from qlora_cli.training.data_order import RowOrder

MOST_NAMED = 16
MOST_AVERAGED = 1000  # steps, which tell of all
MICRO_BATCHES, HOST_COPIES = "micro_batches", "host_copies"
NUM_MICRO_BATCHES, NUM_TRAINED = "num_micro_batches", "num_trained"
MISMATCHED = "mismatched"
BLANKS, IS_BLANK = "blank_micro_batches", "is_blank"
BLANK_TOKENS = 2
NO_INPUTS = frozenset({"labels", "num_tokens", NUM_TRAINED, IS_BLANK, HOST_COPIES, MISMATCHED})  # of a loss
Row = dict[str, Any]
Batch = dict[str, Any]


class BatchCollator:
    """Makes a micro-batch of rows: TRL's, and what the loss would otherwise have to read from the device.

    Besides the tensors of `make_collator`, it has `trained_positions` and `trained_targets`, see `trained_tokens`, and
    `num_tokens`, the number of its tokens without padding. If it `keeps_copies`, `host_copies` are those of masks and
    positions.
    """

    def __init__(self, pad_token_id: int | None, *, packing: bool, keeps_copies: bool = False) -> None:
        self._collate = make_collator(pad_token_id, packing=packing)
        self._keeps_copies = keeps_copies

    def __call__(self, rows: list[Row]) -> Batch:
        """Return the micro-batch."""
        batch: Batch = self._collate(rows)
        positions, targets = trained_tokens(batch["labels"])
        num_tokens = sum(len(row["input_ids"]) for row in rows)
        copies = {HOST_COPIES: host_copies(batch)} if self._keeps_copies else {}
        return {
            **batch,
            **copies,
            "trained_positions": positions,
            "trained_targets": targets,
            "num_tokens": num_tokens,
        }

    def num_items(self, rows: list[Row]) -> int:
        """Return the number of items that the loss of `rows` is a sum over: their trained tokens."""
        return sum(map(num_trained, rows))

    def mismatched(self, rows: list[Row]) -> list[Row]:  # noqa: ARG002 - of a subclass, they are made of them
        """Return further sequences that the loss of a step of `rows` needs, before its first micro-batch."""
        return []

    def alone(self, rows: list[Row]) -> Batch:
        """Return the only micro-batch of a step."""
        others = self.mismatched(rows)
        return {**self(rows), MISMATCHED: [self(others)] if others else []}

    def blank(self, row: Row) -> Row:
        """Return a short row for a micro-batch that is computed for the other processes; no token is trained in it."""
        ids = list(row["input_ids"])[:BLANK_TOKENS]
        blank = {"input_ids": ids, "labels": [IGNORE_INDEX] * len(ids)}
        return {**blank, "seq_lengths": [len(ids)]} if "seq_lengths" in row else blank


class StepCollator:
    """Divides the rows of a step into micro-batches, and makes those of one process, as the settings decide.

    They are filled with rows, without padding, or have a number of rows each. Of a sharded base, all processes have to
    call each layer as often as the others: one with fewer micro-batches `has_blanks`, whose loss counts for nothing.
    """

    def __init__(
        self, collate: BatchCollator, settings: TrainingSettings, rank: int, *, has_blanks: bool = False
    ) -> None:
        self._collate = collate
        self._settings = settings
        self._rank = rank
        self._has_blanks = has_blanks

    def __call__(self, rows: list[Row]) -> Batch:
        """Return a batch of the micro-batches of this process, and how many there are, and their items, in all."""
        micro_batches, blanks, number = self._divided(rows)
        others = self._collate.mismatched(rows)
        mismatched, more_blanks, _ = self._divided(others) if others else ([], [], 0)
        return {
            MISMATCHED: [*mismatched, *more_blanks],
            MICRO_BATCHES: micro_batches,
            BLANKS: [{**blank, IS_BLANK: True} for blank in blanks],
            NUM_MICRO_BATCHES: number,
            NUM_TRAINED: self._collate.num_items(rows),
        }

    def _divided(self, rows: list[Row]) -> tuple[list[Batch], list[Batch], int]:
        """Return the micro-batches of this process, its blanks, and the number of micro-batches of all processes."""
        shares = shares_of_step(np.array([len(row["input_ids"]) for row in rows]), self._settings)
        own = shares[self._rank]
        num_blank = max(map(len, shares)) - len(own) if self._has_blanks else 0
        return (
            [self._collate([rows[place] for place in places]) for places in own],
            [self._collate([self._collate.blank(rows[0])]) for _ in range(num_blank)],
            sum(map(len, shares)),
        )


def num_trained(row: Row) -> int:
    """Return the trained tokens of a row."""
    return int(np.count_nonzero(np.asarray(row["labels"]) != IGNORE_INDEX))


def num_items_of(batch: Batch) -> int:
    """Return how many items the loss of a micro-batch is a sum over: its trained tokens, or its rows."""
    number: int = batch.get(NUM_TRAINED, len(batch["trained_targets"]))
    return number


def loss_inputs(batch: Batch) -> dict[str, Any]:
    """Return what a `LossModel` is called with, of a micro-batch of `BatchCollator`."""
    inputs = {name: value for name, value in batch.items() if name not in NO_INPUTS}
    inputs["positions"], inputs["targets"] = inputs.pop("trained_positions"), inputs.pop("trained_targets")
    copies = batch.get(HOST_COPIES)
    return inputs if copies is None else with_known_values(inputs, copies)


def micro_batches_of(batch: Batch) -> list[Batch]:
    """Return the micro-batches of a batch of `StepCollator`; a batch of `BatchCollator` is one itself."""
    micro_batches: list[Batch] = batch.get(MICRO_BATCHES, [batch])
    return micro_batches


def blanks_of(batch: Batch) -> list[Batch]:
    """Return the micro-batches of a batch that are computed because other processes have more."""
    blanks: list[Batch] = batch.get(BLANKS, [])
    return blanks


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

    def largest(self, num_epochs: float) -> list[list[Row]]:
        """Return the micro-batches of all epochs that need most memory: the one with most tokens, padding included.

        Of filled micro-batches it may be one long row, which needs no mask; then the largest of several rows is next.
        For a stream, whose rows are not known, return rows of `max_length`.
        """
        if self.data.stream is not None:
            return [self._longest_of_stream()]
        candidates = []
        for epoch in range(max(1, int(np.ceil(num_epochs)))):
            order = np.array(list(self._order(epoch)))
            candidates += [order[places].tolist() for places in _largest(self._sizes[order], self.settings)]
        return [[self.data.dataset[index] for index in rows] for rows in self._largest_of(candidates)]

    def _largest_of(self, candidates: list[list[int]]) -> list[list[int]]:
        """Return the candidate that needs most memory; and if it is one row, the largest of several."""
        lengths = self._sizes

        def size(rows: list[int]) -> tuple[int, int]:
            longest = int(lengths[rows].max())
            return int(lengths[rows].sum()) if self._is_filled else longest * len(rows), longest

        best = max(candidates, key=size)
        joined = [rows for rows in candidates if len(rows) > 1]
        return [best, max(joined, key=size)] if self._is_filled and len(best) == 1 and joined else [best]

    @property
    def _sizes(self) -> Numbers:
        """What each row takes of a micro-batch: its tokens, or those that it is padded to at least."""
        return self.data.lengths if self._is_filled else self.data.padded_lengths

    @property
    def _is_filled(self) -> bool:
        return self.settings.micro_batch_tokens is not None

    def _longest_of_stream(self) -> list[Row]:
        """Return rows of `max_length`; if micro-batches are filled, as many as fit, and another of what is left."""
        row, tokens = self.data.dataset[0], self.settings.micro_batch_tokens
        if tokens is None:
            return [self._repeated(row, self.max_length)] * self.settings.micro_batch_size
        rows = self.settings.micro_batch_size * self.settings.gradient_accumulation_steps
        whole, rest = divmod(max(tokens, self.max_length), self.max_length)
        lengths = [self.max_length] * whole + [rest] * (rest > 0)
        return [self._repeated(row, length) for length in lengths[:rows]]

    def _repeated(self, row: Row, length: int) -> Row:
        stretched = {name: (list(row[name]) * length)[:length] for name in ("input_ids", "labels")}
        return {**stretched, "seq_lengths": [length]} if self.is_packed else stretched

    def _order(self, epoch: int) -> RowOrder:
        return RowOrder(self.data.lengths, self.settings, epoch)

    def _indices(self, step: int, micro_batch: int) -> list[int]:
        num_rows, lengths = self.settings.rows_per_step, self.data.lengths
        epoch, step_of_epoch = divmod(step, -(-len(lengths) // num_rows))
        start = step_of_epoch * num_rows
        rows = list(self._order(epoch))[start : start + num_rows]
        return micro_batches_of_step(rows, lengths, self.settings)[micro_batch]

    def _rows_at(self, index: int) -> list[int]:
        """Return the rows at one index of the data set: several if they are packed."""
        row = self.data.dataset.with_format(None)[int(index)]
        return list(row["rows"]) if "rows" in row else [int(index)]


def largest_held_out(data: PreparedData, settings: TrainingSettings) -> list[Row]:
    """Return the micro-batch of an evaluation, in the order of the rows, that needs most memory."""
    sizes = data.padded_lengths if settings.micro_batch_tokens is None else data.lengths
    places = max(_largest(sizes, settings), key=lambda places: int(sizes[places].sum()))
    return [data.dataset[place] for place in places]


def _largest(lengths: Numbers, settings: TrainingSettings) -> list[list[int]]:
    """Return the places of rows in the micro-batches that may need most memory, of rows of these lengths in order."""
    size = settings.micro_batch_size
    if settings.micro_batch_tokens is not None:
        return _largest_filled(lengths, settings)
    starts = np.arange(0, len(lengths), size)
    longest = np.maximum.reduceat(lengths, starts)
    counts = np.minimum(size, len(lengths) - starts)
    start = int(starts[np.lexsort((longest, longest * counts))[-1]])
    return [list(range(start, min(start + size, len(lengths))))]


def _largest_filled(lengths: Numbers, settings: TrainingSettings) -> list[list[int]]:
    """Return the longest row, and if there is one of several rows, the largest micro-batch of those."""
    most, largest, num_rows = 0, list[int](), settings.rows_per_step
    for start in range(0, len(lengths), num_rows):
        if most == settings.micro_batch_tokens:
            break
        of_step = lengths[start : start + num_rows]
        for places in (places for share in shares_of_step(of_step, settings) for places in share):
            num_tokens = int(of_step[places].sum())
            if len(places) > 1 and num_tokens > most:
                most, largest = num_tokens, [start + place for place in places]
    alone = [int(np.argmax(lengths))]
    return [alone, largest] if largest else [alone]


def average_step(lengths: Numbers, settings: TrainingSettings) -> StepRows:
    """Return the rows of a step on average, of rows of these lengths, by the first steps of the first epoch.

    With several processes, they are those of the one that has most to do.
    """
    num_rows = settings.rows_per_step
    in_order = lengths[epoch_order(lengths, settings)]
    steps = [in_order[start : start + num_rows] for start in range(0, len(in_order), num_rows)[:MOST_AVERAGED]]
    shares = [[step[own] for own in balance(step, settings.num_gpus)] for step in steps]
    return StepRows(
        num_rows=float(np.mean([max(map(len, of_step)) for of_step in shares])),
        mean_tokens=float(np.mean(np.concatenate(steps))),
        num_filled=lambda tokens: float(
            np.mean([max(len(fill_micro_batches(share, tokens)) for share in of_step) for of_step in shares])
        ),
    )
