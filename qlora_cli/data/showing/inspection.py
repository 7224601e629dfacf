"""Look at a data set as training would take it: what is read, what is trained, what is lost, and what looks wrong."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.feeding.data_report import NEARLY_EQUAL, DataReport
from qlora_cli.data.feeding.order import padding_share, row_order
from qlora_cli.data.feeding.packing import best_fit
from qlora_cli.data.feeding.prepare import PreparedData, near_duplicates, prepare_data, refusals
from qlora_cli.data.feeding.token_table import Table, first_of_each
from qlora_cli.data.opening.skipped import read_skipped_rows
from qlora_cli.data.showing.preview import RowPreview, preview_rows
from qlora_cli.data.tokenizing.encode import TextTokenizer
from qlora_cli.settings.choices import Sampling
from qlora_cli.settings.models import DataSettings, TrainingSettings
from qlora_cli.settings.settle import varied

MAX_SHOWN_FOLDERS = 5  # rows that are named of each kind of trouble
NUM_BARS = 16
STEPS = (1, 2, 5)
LONG_TAIL = 20  # a longest row of so many times the median is drawn on doubling bars


@dataclass(frozen=True, kw_only=True)
class Bar:
    """Rows of `first` to `last` tokens, both included."""

    first: int
    last: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Rows that are worth a look; `where` names the first of them by file and number."""

    kind: str
    rows: int
    where: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class BatchSummary:
    """What batches of these rows are made of.

    Attributes:
        micro_batch_size: Rows of a batch.
        padding_share: Share of pad tokens, in the order that the settings ask for.
        grouped_padding_share: The same with batches of rows of one length.
        packed_rows: Rows that packing comes to.
        packing_efficiency: Share of the packed rows that is filled.
    """

    micro_batch_size: int
    padding_share: float
    grouped_padding_share: float
    packed_rows: int
    packing_efficiency: float


@dataclass(frozen=True, kw_only=True)
class DataInspection:
    """What `qlora inspect-data` says. Lengths in tokens.

    Attributes:
        data: What became of the rows to train on. Rows that can't be used are left out, as with `--on-bad-row skip`.
        evaluation: The same of those that are held out, if there are any.
        max_length: The longest length that rows are cut at.
        longest_uncut_tokens: Tokens of the longest row, before any is cut.
        median_uncut_tokens: The number that half of the rows do not exceed, before any is cut.
        lengths: How many whole rows have which length.
        batches: Padding and packing.
        troubles: Rows that are worth a look, by kind.
        notes: What a user should know about template and tokenizer.
        skipped_rows: Lists of the rows that can't be used.
        previews: The first rows, token by token.
        refusals: Why `train` would not take the data with these settings.
    """

    data: DataReport
    evaluation: DataReport | None
    max_length: int
    longest_uncut_tokens: int
    median_uncut_tokens: int
    lengths: tuple[Bar, ...]
    batches: BatchSummary
    troubles: tuple[Trouble, ...]
    notes: tuple[str, ...]
    skipped_rows: tuple[Path, ...]
    previews: tuple[RowPreview, ...]
    refusals: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return all of it by name, what became of the rows to train on first and on the same level."""
        whole = asdict(self)
        return {**whole.pop("data"), **whole}


def inspect_data(
    settings: DataSettings, training: TrainingSettings, text: TextTokenizer, *, num_previews: int
) -> DataInspection:
    """Prepare the data as `train` would, and look at it.

    Raises:
        QloraError: as `prepare_data` does.
    """
    # What is looked at are the rows themselves; what packing would come to is computed beside.
    looked_at = varied(settings, packing=False)
    found = prepare_data(looked_at, text, seed=training.seed, only_look=True)
    both = [data for data in (found.train, found.evaluation) if data is not None]
    train, table = found.train, found.train.table
    near = [] if found.evaluation is None else _near_duplicates(train, found.evaluation)
    return DataInspection(
        data=train.report,
        evaluation=found.evaluation.report if found.evaluation else None,
        max_length=settings.max_length,
        longest_uncut_tokens=int(table.length.max()),
        median_uncut_tokens=int(np.median(table.length)),
        lengths=count_lengths(table.length),
        batches=_batches(train, training, settings.max_length),
        troubles=(*(trouble for data in both for trouble in _bad_rows(data)), *_troubles(table, settings), *near),
        notes=train.notes,
        skipped_rows=train.skipped,
        previews=preview_rows(train, text.tokenizer, num_previews),
        refusals=tuple(str(refusal) for data in both for refusal in refusals(data, settings)),
    )


def count_lengths(lengths: NDArray[np.int64]) -> tuple[Bar, ...]:
    """Return how many rows have which length: on bars of one width, or doubling ones if a few rows are far longer."""
    longest = max(1, int(lengths.max()))
    if longest > LONG_TAIL * max(1, np.median(lengths)):
        edges = [0, *(2**power for power in range(3, longest.bit_length() + 1))]
    else:
        width = next(
            step * 10**power for power in range(12) for step in STEPS if step * 10**power * NUM_BARS >= longest
        )
        edges = list(range(0, longest + width, width))
    # Each bar ends where the next begins: (0, 8], (8, 16], …
    counts, _ = np.histogram(lengths, bins=np.array(edges) + 0.5)
    begin = int(np.flatnonzero(counts)[0])  # no empty bars before the shortest row
    return tuple(
        Bar(first=first + 1, last=last, rows=int(count))
        for first, last, count in list(zip(edges, edges[1:], counts, strict=False))[begin:]
    )


def _batches(data: PreparedData, training: TrainingSettings, max_length: int) -> BatchSummary:
    def share(sampling: Sampling) -> float:
        order = row_order(
            data.lengths,
            sampling,
            batch_rows=training.micro_batch_size * training.gradient_accumulation_steps,
            longest_first=training.longest_first,
            seed=training.seed,
        )
        return padding_share(data.lengths, order, training.micro_batch_size)

    num_packed = len(best_fit(data.lengths, max_length))
    return BatchSummary(
        micro_batch_size=training.micro_batch_size,
        padding_share=share(training.sampling),
        grouped_padding_share=share(Sampling.GROUP_BY_LENGTH),
        packed_rows=num_packed,
        packing_efficiency=int(data.lengths.sum()) / (num_packed * max_length),
    )


def _troubles(table: Table, settings: DataSettings) -> list[Trouble]:
    """Return the kinds of rows that are worth a look, those that are there."""
    no_answer = (table.supervised + table.lost) == 0
    all_cut = (table.supervised == 0) & (table.lost > 0)
    kinds = (
        ("all prompt: not a token to train", no_answer),
        (f"longer than {settings.max_length:,} tokens", table.length > settings.max_length),
        ("nothing left to train within the longest length", all_cut),
        ("equal to an earlier row", ~first_of_each(table.digest)),
    )
    return [
        Trouble(kind=kind, rows=int(mask.sum()), where=_where(table, np.flatnonzero(mask)[:MAX_SHOWN_FOLDERS]))
        for kind, mask in kinds
        if mask.any()
    ]


def _near_duplicates(train: PreparedData, evaluation: PreparedData) -> list[Trouble]:
    """Return the rows that are held out and nearly equal to one that is trained."""
    near = near_duplicates(train, evaluation)
    if not len(near):
        return []
    kind = f"held out {NEARLY_EQUAL}"
    return [Trouble(kind=kind, rows=len(near), where=_where(evaluation.table, near[:MAX_SHOWN_FOLDERS]))]


def _bad_rows(data: PreparedData) -> list[Trouble]:
    """Return the rows that can't be used, and of the first of them why."""
    if not data.report.bad_rows:
        return []
    where = tuple(map(str, read_skipped_rows(data.skipped, MAX_SHOWN_FOLDERS)))
    empty = f" ({data.report.empty_answers:,} for an empty answer)" if data.report.empty_answers else ""
    return [Trouble(kind=f"can't be used{empty}", rows=data.report.bad_rows, where=where)]


def _where(table: Table, rows: NDArray[np.int64]) -> tuple[str, ...]:
    return tuple(table.where(int(row)) for row in rows)
