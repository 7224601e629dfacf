"""Inspect a data set as training would use it: rows read, tokens trained and lost, and rows that look wrong."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.feeding.data_report import NEARLY_EQUAL, DataReport
from qlora_cli.data.feeding.label_balance import balance_notes, label_refusals
from qlora_cli.data.feeding.micro_batches import micro_batch_tokens, padding_of_epoch
from qlora_cli.data.feeding.packing import best_fit
from qlora_cli.data.feeding.prepare import PreparedData, near_duplicates, prepare_data, refusals
from qlora_cli.data.feeding.token_table import TokenTable, first_occurrences
from qlora_cli.data.opening.skipped import read_skipped_rows
from qlora_cli.data.showing.preview import RowPreview, preview_rows
from qlora_cli.data.tokenizing.encode import TextTokenizer
from qlora_cli.settings.choices import Sampling
from qlora_cli.settings.models import DataSettings, TrainingSettings
from qlora_cli.settings.settle import with_values

MAX_SHOWN_ROWS = 5  # of each kind of trouble
NUM_BARS = 16
STEPS = (1, 2, 5)
LONG_TAIL = 20  # times the median: bars double in width if the longest row exceeds it


@dataclass(frozen=True, kw_only=True)
class Bar:
    """The number of rows of `first` to `last` tokens, inclusive."""

    first: int
    last: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """A kind of suspicious row, with their number; `where` names the first ones by file and number."""

    kind: str
    rows: int
    where: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class BatchSummary:
    """Padding and packing of batches of the rows.

    Attributes:
        micro_batch_size: Rows of a batch.
        micro_batch_tokens: The most tokens of a batch; None if each has `micro_batch_size` rows.
        micro_batches: The number of batches of an epoch that are filled with tokens; None if none are.
        padding_share: The share of pad tokens, in the order that the settings ask for.
        grouped_padding_share: The same with rows grouped by length.
        packed_rows: The number of rows after packing; None for answers that are compared, which are not packed.
        packing_efficiency: The share of tokens in packed rows that are filled; None if there are none.
    """

    micro_batch_size: int
    micro_batch_tokens: int | None
    micro_batches: int | None
    padding_share: float
    grouped_padding_share: float
    packed_rows: int | None
    packing_efficiency: float | None


@dataclass(frozen=True, kw_only=True)
class DataInspection:
    """The result of `qlora inspect-data`. Lengths are in tokens.

    Attributes:
        data: The report on the rows to train on. Rows that can't be used are skipped, as with `--on-bad-row skip`.
        evaluation: The report on held-out rows, if there are any.
        max_length: The length that rows are truncated to.
        longest_uncut_tokens: The length of the longest row before truncation; of a pair, of its longer answer.
        median_uncut_tokens: The median length before truncation.
        lengths: The histogram of lengths before truncation.
        batches: Padding and packing.
        troubles: Suspicious rows, by kind.
        notes: Notes for the user on template and tokenizer.
        skipped_rows: The files that list rows that can't be used.
        previews: The first rows, token by token.
        refusals: The reasons why `train` would refuse the data with these settings.
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
        """Return the result as a JSON object, with the report on the rows to train on at the top level."""
        whole = asdict(self)
        return {**whole.pop("data"), **whole}


def inspect_data(
    settings: DataSettings, training: TrainingSettings, text: TextTokenizer, *, num_previews: int
) -> DataInspection:
    """Prepare the data as `train` would, and report on it.

    Raises:
        QloraError: as `prepare_data` does.
    """
    # The rows are inspected unpacked; the effect of packing is computed separately.
    unpacked = with_values(settings, packing=False)
    prepared = prepare_data(unpacked, text, seed=training.seed, inspect_only=True)
    both = [data for data in (prepared.train, prepared.evaluation) if data is not None]
    train, table = prepared.train, prepared.train.table
    near = [] if prepared.evaluation is None else _near_duplicates(train, prepared.evaluation)
    return DataInspection(
        data=train.report,
        evaluation=prepared.evaluation.report if prepared.evaluation else None,
        max_length=settings.max_length,
        longest_uncut_tokens=int(table.longest.max()),
        median_uncut_tokens=int(np.median(table.longest)),
        lengths=count_lengths(table.longest),
        batches=_batches(train, training, settings.max_length),
        troubles=(*(trouble for data in both for trouble in _bad_rows(data)), *_troubles(table, settings), *near),
        notes=(*train.notes, *balance_notes(train.report, training)),
        skipped_rows=train.skipped,
        previews=preview_rows(train, text.tokenizer, num_previews),
        refusals=tuple(
            str(refusal)
            for refusal in (*(one for data in both for one in refusals(data, settings)), *label_refusals(train.report))
        ),
    )


def count_lengths(lengths: NDArray[np.int64]) -> tuple[Bar, ...]:
    """Return the histogram of lengths, with bars of equal width, or of doubling width if a few rows are far longer."""
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
    start = int(np.flatnonzero(counts)[0])  # no empty bars before the shortest row
    return tuple(
        Bar(first=first + 1, last=last, rows=int(count))
        for first, last, count in list(zip(edges, edges[1:], counts, strict=False))[start:]
    )


def _batches(data: PreparedData, training: TrainingSettings, max_length: int) -> BatchSummary:
    tokens = training.micro_batch_tokens

    def share(sampling: Sampling) -> float:
        ordered = with_values(training, sampling=sampling)
        return padding_of_epoch(data.lengths, ordered, is_packed=False, padded_lengths=data.padded_lengths)

    filled = None
    if tokens is not None:
        num_steps = training.steps_per_epoch(len(data.lengths))
        filled = micro_batch_tokens(data.lengths, training, num_steps=num_steps, is_packed=False).total()
    is_compared = data.table.has_pairs or data.table.has_labels
    num_packed = None if is_compared else len(best_fit(data.lengths, max_length))
    return BatchSummary(
        micro_batch_size=training.micro_batch_size,
        micro_batch_tokens=tokens,
        micro_batches=filled,
        padding_share=share(training.sampling),
        grouped_padding_share=share(Sampling.GROUP_BY_LENGTH),
        packed_rows=num_packed,
        packing_efficiency=None if num_packed is None else int(data.lengths.sum()) / (num_packed * max_length),
    )


def _troubles(table: TokenTable, settings: DataSettings) -> list[Trouble]:
    """Return the kinds of suspicious rows that occur."""
    no_answer = (table.trained + table.lost) == 0
    all_truncated = (table.trained == 0) & (table.lost > 0)
    kinds = (
        ("all prompt: no token to train", no_answer),
        (f"longer than {settings.max_length:,} tokens", table.longest > settings.max_length),
        ("nothing left to train within the max length", all_truncated),
        ("equal to an earlier row", ~first_occurrences(table.digest)),
    )
    return [
        Trouble(kind=kind, rows=int(mask.sum()), where=_where(table, np.flatnonzero(mask)[:MAX_SHOWN_ROWS]))
        for kind, mask in kinds
        if mask.any()
    ]


def _near_duplicates(train: PreparedData, evaluation: PreparedData) -> list[Trouble]:
    """Return the held-out rows that nearly equal a trained one."""
    near = near_duplicates(train, evaluation)
    if not len(near):
        return []
    kind = f"held out {NEARLY_EQUAL}"
    return [Trouble(kind=kind, rows=len(near), where=_where(evaluation.table, near[:MAX_SHOWN_ROWS]))]


def _bad_rows(data: PreparedData) -> list[Trouble]:
    """Return the rows that can't be used, with the problems of the first ones."""
    if not data.report.bad_rows:
        return []
    where = tuple(map(str, read_skipped_rows(data.skipped, MAX_SHOWN_ROWS)))
    empty = f" ({data.report.empty_answers:,} for an empty answer)" if data.report.empty_answers else ""
    return [Trouble(kind=f"can't be used{empty}", rows=data.report.bad_rows, where=where)]


def _where(table: TokenTable, rows: NDArray[np.int64]) -> tuple[str, ...]:
    return tuple(table.where(int(row)) for row in rows)
