"""Prepare the rows to train and evaluate on, as tokens and labels, with a report on what became of each."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset

from qlora_cli.data.feeding.data_report import Contribution, DataReport
from qlora_cli.data.feeding.held_out import HeldOutDigests, hold_out
from qlora_cli.data.feeding.label_balance import label_refusals
from qlora_cli.data.feeding.mixing import mix
from qlora_cli.data.feeding.packing import best_fit, pack
from qlora_cli.data.feeding.stream import MAX_LOST_SHARE, TokenStream
from qlora_cli.data.feeding.token_table import Mask, Numbers, TokenTable, first_occurrences
from qlora_cli.data.finding.sources import DatasetSource
from qlora_cli.data.opening.first_rows import ConfiguredDataset, first_rows_errors
from qlora_cli.data.opening.skipped import bad_row_error, read_skipped_rows
from qlora_cli.data.opening.train_and_eval import eval_split, held_out_sources, source_notes, trained_sources
from qlora_cli.data.rows.groups import NO_GROUP
from qlora_cli.data.tokenizing.encode import HEAD_ROWS, TextTokenizer, is_tokenized, tokenize_source, try_rows
from qlora_cli.errors import DataError
from qlora_cli.settings.choices import Mixing, OnBadRow, OnLong
from qlora_cli.settings.error_collector import ErrorCollector
from qlora_cli.settings.models import DataSettings
from qlora_cli.settings.settle import with_values
from qlora_cli.settings.values import held_out_share
from qlora_cli.units import counted


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Rows of `input_ids` and `labels`, both `(seq,)` with seq ≤ max_length, and the report on them.

    A pair is a row of two sequences, each of up to max_length tokens, and `first` is the length of the first one. Of
    an answer with a label, `desirable` is 1 if it is wanted, and 0 if not.
    `lengths` are those of the rows of `dataset`, int64 `(rows,)`, and `padded_lengths` what they take where all their
    sequences are padded to the longest; `share_lost` is the share of the tokens to train
    that truncating and dropping long rows loses, each row counted once. `table` has all rows that were read, and
    `selected` the indices of those that are fed, before packing. With a `stream`, whose rows are read during training,
    everything else describes its first rows.
    """

    dataset: Dataset
    stream: TokenStream | None = None
    lengths: Numbers
    padded_lengths: Numbers
    share_lost: float
    report: DataReport
    notes: tuple[str, ...]
    skipped: tuple[Path, ...]
    table: TokenTable
    selected: Numbers

    @property
    def longest_tokens(self) -> int:
        """The tokens of the longest sequence that is fed: a row, packed or not, or one side of a pair."""
        return int(self.padded_lengths.max()) // (2 if self.table.has_pairs else 1)


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The rows to train on and those held out for evaluation, which never overlap."""

    train: PreparedData
    evaluation: PreparedData | None

    @property
    def longest_tokens(self) -> int:
        """The tokens of the longest sequence that is fed, trained or held out."""
        return max(data.longest_tokens for data in (self.train, self.evaluation) if data is not None)


def prepare_data(
    settings: DataSettings, text: TextTokenizer, *, seed: int, inspect_only: bool = False
) -> TrainingData:
    """Read, recognise, tokenize, truncate, select and mix the rows that `settings` name.

    With `inspect_only`, data that training would refuse is not an error; `refusals` returns the reasons.

    Raises:
        DatasetNotFoundError: no such data set.
        DataError: it can't be read, a row is bad (named by file and number), more is lost than is accepted, or
            no row is left.
    """
    if inspect_only:
        settings = with_values(settings, on_bad_row=OnBadRow.SKIP)
    sources = trained_sources(settings)
    if len(sources) + len(held_out_sources(settings)) > 1:
        _check_first_rows(settings, text, seed)
    max_rows = HEAD_ROWS if settings.streaming else None
    table = _tokenize_sources(sources, settings.split, settings, text, seed, max_rows)
    rows, evaluation, notes = _hold_out(_RowSelection.from_table(table, settings), settings, text, seed)
    train = _training_rows(rows, sources, settings, seed, notes)
    if evaluation is not None:
        num_near = len(near_duplicates(train, evaluation))
        evaluation = replace(evaluation, report=replace(evaluation.report, near_duplicate_rows=num_near))
    if not inspect_only:
        found = [error for data in (train, evaluation) if data is not None for error in refusals(data, settings)]
        for error in (*found, *label_refusals(train.report)):
            raise error
    if settings.streaming:
        stream = TokenStream(sources, settings, text, seed=seed, held_out=_held_out_digests(evaluation))
        train = replace(_streamed(train, sources), stream=stream)
    elif settings.packing:
        train = _packed(train, settings.max_length)
    train = replace(train, notes=(*source_notes(sources, held_out_sources(settings)), *train.notes))
    return TrainingData(train=train, evaluation=evaluation)


def near_duplicates(train: PreparedData, evaluation: PreparedData) -> Numbers:
    """Return the indices of held-out rows that equal a trained one except for case, punctuation and spaces."""
    trained, held_out = (data.table.text_digest[data.selected] for data in (train, evaluation))
    return evaluation.selected[np.isin(held_out, trained)]


def refusals(data: PreparedData, settings: DataSettings) -> list[DataError]:
    """Return the errors for which `settings` do not allow training on `data`."""
    report, errors = data.report, []
    if report.bad_rows and settings.on_bad_row == OnBadRow.ERROR:
        errors.append(bad_row_error(*read_skipped_rows(data.skipped, 1)))
    num_long = report.truncated_rows + report.dropped_rows
    lengths = data.table.longest
    what = "answer, with its prompt," if data.table.has_pairs else "row"
    longest = f"the longest {what} has {int(lengths.max()):,} tokens"
    if num_long and settings.on_long == OnLong.ERROR:
        first = int(np.flatnonzero(lengths > settings.max_length)[0])
        others = f", as {counted(num_long - 1, 'other row')}" if num_long > 1 else ""
        errors.append(
            DataError(
                f"{data.table.where(first)}: {int(lengths[first]):,} tokens, more than --max-length "
                f"{settings.max_length:,}{others}",
                hint=f"Raise --max-length ({longest}), or use --on-long truncate or drop.",
            )
        )
    elif data.share_lost > MAX_LOST_SHARE and not settings.accept_lost:
        errors.append(
            DataError(
                f"{report.name}: {100 * data.share_lost:.1f} % of the tokens to train are lost with rows longer than "
                f"{settings.max_length:,} tokens ({report.supervised_tokens_lost:,} in {counted(num_long, 'row')})",
                hint=f"Raise --max-length ({longest}), or accept it with --accept-lost.",
            )
        )
    return errors


@dataclass(frozen=True)
class _RowSelection:
    """Masks over the rows of a table that decide which are fed; every array is bool `(rows,)`."""

    table: TokenTable
    too_long: Mask
    drops_long: bool
    untrained: Mask
    repeated: Mask
    drops_repeated: bool
    held_out: Mask

    @classmethod
    def from_table(cls, table: TokenTable, settings: DataSettings) -> "_RowSelection":
        return cls(
            table=table,
            too_long=table.longest > settings.max_length,
            drops_long=settings.on_long == OnLong.DROP,
            untrained=table.trained == 0,
            repeated=~first_occurrences(table.digest),
            drops_repeated=settings.drop_duplicates,
            held_out=np.zeros(len(table), dtype=bool),
        )

    def without(self, held_out: Mask) -> "_RowSelection":
        """Return the selection with these rows held out."""
        return replace(self, held_out=held_out)

    @property
    def usable(self) -> Mask:
        """Rows with a token to train, without those dropped for being too long."""
        return ~self.untrained & ~(self.too_long & self.drops_long)

    def selected(self) -> Numbers:
        """Return the indices of the rows to feed."""
        return np.flatnonzero(self.usable & ~(self.repeated & self.drops_repeated) & ~self.held_out)


def _tokenize_sources(
    sources: Sequence[DatasetSource],
    split: str,
    settings: DataSettings,
    text: TextTokenizer,
    seed: int,
    max_rows: int | None = None,
) -> TokenTable:
    return TokenTable([tokenize_source(source, split, settings, text, seed, max_rows=max_rows) for source in sources])


def _check_first_rows(settings: DataSettings, text: TextTokenizer, seed: int) -> None:
    """Check that each data set can be read, before the first one is tokenized as a whole.

    Raises:
        DataError: one can't.
        SettingsError: several can't.
    """

    def is_to_be_read(dataset: ConfiguredDataset) -> bool:
        max_rows = HEAD_ROWS if settings.streaming and dataset.is_trained else None
        is_done = is_tokenized(dataset.source, dataset.split, settings, text, seed, max_rows=max_rows)
        return dataset.source.is_local or not is_done

    errors = ErrorCollector()
    check_rows = partial(try_rows, settings=settings, text=text)
    errors.extend(first_rows_errors(settings, seed, include=is_to_be_read, check_rows=check_rows))
    errors.raise_collected()


def _hold_out(
    rows: _RowSelection, settings: DataSettings, text: TextTokenizer, seed: int
) -> tuple[_RowSelection, PreparedData | None, list[str]]:
    """Return the rows left to train on, the evaluation data if any is held out, and notes on the division."""
    if settings.eval_dataset is None and settings.eval_split is None:
        return rows, None, []
    held_rows = _held_out_rows(rows, settings, text, seed)
    is_part = held_rows.table is rows.table
    evaluation = _select_rows(held_rows, held_rows.selected(), settings, is_part=is_part)
    rows = rows.without(_held_out_digests(evaluation).mask_in(rows.table))
    return rows, evaluation, _split_notes(rows, held_rows, settings) if is_part else []


def _held_out_digests(evaluation: PreparedData | None) -> HeldOutDigests:
    if evaluation is None:
        return HeldOutDigests()
    return HeldOutDigests.from_rows(evaluation.table, evaluation.selected)


def _training_rows(
    rows: _RowSelection, sources: Sequence[DatasetSource], settings: DataSettings, seed: int, notes: Sequence[str]
) -> PreparedData:
    """Return the rows to train on, mixed by the weights of their sources; `notes` are added to its own."""
    selected = rows.selected()
    if len(selected) and not settings.streaming:  # a stream mixes the rows as it reads them
        selected = mix(selected, rows.table.source[selected], sources, settings.mixing, seed)
    train = _select_rows(rows, selected, settings)
    return replace(train, notes=(*train.notes, *notes, *_mixture_notes(train.report, sources, settings)))


def _held_out_rows(rows: _RowSelection, settings: DataSettings, text: TextTokenizer, seed: int) -> _RowSelection:
    """Return the selection of held-out rows: a part of `rows`, or separate data sets."""
    holdout_key = rows.table.holdout_key
    candidates = holdout_key[rows.usable]
    num_requested = _num_to_hold_out(settings, len(candidates))
    if num_requested is not None and len(candidates) == 0:
        raise _no_rows_error(rows, _report(rows, rows.selected(), settings), settings)
    if num_requested is None:
        return _RowSelection.from_table(_read_held_out(settings, text, seed), settings)
    if num_requested >= len(candidates):
        raise _not_held_out_error(settings, f"there are {len(candidates):,} that can be used")
    chosen = candidates[hold_out(candidates, num_requested, seed)]
    if len(chosen) == 0:
        group = settings.eval_group
        raise _not_held_out_error(
            settings, "they are all equal" if group is None else f"they are all of one {group!r}"
        )
    return rows.without(~np.isin(holdout_key, chosen))


def _num_to_hold_out(settings: DataSettings, num_rows: int) -> int | None:
    """Return how many of `num_rows` usable rows to hold out; None if held-out rows come from a separate data set."""
    share = held_out_share(settings.eval_split) if settings.eval_split is not None else None
    return max(1, round(share * num_rows)) if isinstance(share, float) else share


def _split_notes(rows: _RowSelection, part: _RowSelection, settings: DataSettings) -> list[str]:
    """Return notes on a part of the rows that is held out; `rows` are those left to train on."""
    together = "that are equal" if settings.eval_group is None else f"of one {settings.eval_group!r}"
    num_held = int((part.usable & ~part.held_out).sum())
    num_requested = _num_to_hold_out(settings, int(rows.usable.sum()))
    notes = []
    if num_requested is not None and abs(num_held - num_requested) > num_requested / 2:
        notes.append(
            f"{counted(num_held, 'row')} held out, where {settings.eval_split} would be {num_requested:,}: "
            f"rows {together} are kept together"
        )
    if num_equal := int((rows.usable & rows.held_out & part.held_out).sum()):
        other = f"with another {settings.eval_group!r}"
        notes.append(
            f"{counted(num_equal, 'row')} neither trained on nor held out: equal to one that is held out {other}"
        )
    return notes


def _not_held_out_error(settings: DataSettings, reason: str) -> DataError:
    return DataError(
        f"{settings.eval_split} can't be held out of {', '.join(settings.dataset)} with rows left to train on: "
        f"{reason}",
        hint="Hold out fewer, or name held-out rows with --eval-dataset.",
        setting="data.eval_split",
    )


def _read_held_out(settings: DataSettings, text: TextTokenizer, seed: int) -> TokenTable:
    return _tokenize_sources(held_out_sources(settings), eval_split(settings), settings, text, seed)


def _select_rows(
    rows: _RowSelection, selected: Numbers, settings: DataSettings, *, is_part: bool = False
) -> PreparedData:
    """Return the `selected` rows with a report; `is_part`: they are held out of a table that training reports on."""
    table, is_read = rows.table, ~rows.held_out
    report = _report(rows, selected, settings)
    if is_part:
        report = replace(report, bad_rows=0, empty_answers=0, held_out_rows=0)
    if len(selected) == 0:
        raise _no_rows_error(rows, report, settings)
    lengths, columns = table.fed[selected], ["input_ids", "labels"]
    columns += [name for name, has_it in (("first", table.has_pairs), ("desirable", table.has_labels)) if has_it]
    return PreparedData(
        dataset=table.dataset.select_columns(columns).select(selected),
        lengths=lengths,
        padded_lengths=2 * table.longest_fed[selected] if table.has_pairs else lengths,
        share_lost=report.supervised_tokens_lost / int((table.trained + table.lost)[is_read].sum()),
        report=report,
        notes=() if is_part else tuple(dict.fromkeys(note for dataset in table.datasets for note in dataset.notes)),
        skipped=() if is_part else table.skipped,
        table=table,
        selected=selected,
    )


def _streamed(data: PreparedData, sources: Sequence[DatasetSource]) -> PreparedData:
    first = counted(data.report.rows, "row")
    notes = [f"{data.report.name} is streamed: its statistics are about the first {first}"]
    if len(sources) > 1:
        total = sum(source.weight for source in sources)
        shares = ", ".join(f"{float(source.weight / total):.1%} {source.name}" for source in sources)
        notes.append(f"each row of the stream is drawn at random: {shares}")
    return replace(data, notes=(*notes, *data.notes))


def _packed(data: PreparedData, max_length: int) -> PreparedData:
    bins = best_fit(data.lengths, max_length)
    lengths = np.array([data.lengths[rows].sum() for rows in bins])
    return replace(
        data,
        dataset=pack(data.dataset, bins),
        lengths=lengths,
        padded_lengths=lengths,
        report=replace(data.report, packed_rows=len(bins)),
    )


def _report(rows: _RowSelection, selected: Numbers, settings: DataSettings) -> DataReport:
    table, is_read = rows.table, ~rows.held_out
    lengths = table.fed
    dropped = is_read & rows.too_long & rows.drops_long
    truncated = is_read & rows.too_long & ~dropped
    return DataReport(
        name=", ".join(dataset.name for dataset in table.datasets),
        format=", ".join(dict.fromkeys(dataset.format for dataset in table.datasets)),
        recognised=", ".join(dict.fromkeys(dataset.recognised for dataset in table.datasets)),
        rows=int(is_read.sum()),
        rows_trained=len(selected),
        tokens=int(lengths[selected].sum()),
        supervised_tokens=int(table.trained[selected].sum()),
        longest_row_tokens=int(lengths[selected].max(initial=0)),
        truncated_rows=int(truncated.sum()),
        dropped_rows=int(dropped.sum()),
        tokens_lost=int((table.length - lengths)[truncated].sum() + table.length[dropped].sum()),
        supervised_tokens_lost=int(table.lost[truncated].sum() + (table.trained + table.lost)[dropped].sum()),
        rows_without_supervision=int((is_read & ~dropped & rows.untrained).sum()),
        duplicate_rows=int((is_read & rows.repeated).sum()),
        duplicates_dropped=int((is_read & rows.usable & rows.repeated & rows.drops_repeated).sum()),
        held_out_rows=int(rows.held_out.sum()),
        near_duplicate_rows=None,
        desirable_rows=int((table.desirable[selected] == 1).sum()) if table.has_labels else None,
        groups=None if settings.eval_group is None else len(np.setdiff1d(table.group[selected], [NO_GROUP])),
        bad_rows=sum(dataset.num_bad for dataset in table.datasets),
        empty_answers=sum(dataset.num_empty for dataset in table.datasets),
        mixture=tuple(_contributions(table, selected)),
        packed_rows=None,
        fingerprint=_fingerprint(table, lengths, selected),
    )


def _contributions(table: TokenTable, selected: Numbers) -> Iterator[Contribution]:
    source, trained = table.source[selected], table.trained[selected]
    for index, dataset in enumerate(table.datasets):
        is_own = source == index
        num_rows, num_tokens = int(is_own.sum()), int(trained[is_own].sum())
        share = num_rows / max(1, len(selected))
        yield Contribution(name=dataset.name, rows=num_rows, share=share, supervised_tokens=num_tokens)


def _mixture_notes(report: DataReport, sources: Sequence[DatasetSource], settings: DataSettings) -> Iterator[str]:
    if settings.streaming or len(sources) == 1:
        return
    yield from (f"no row of {part.name} is fed" for part in report.mixture if part.rows == 0)
    if settings.mixing == Mixing.WEIGHTS and sum(source.weight for source in sources) == 1:
        yield (
            "the weights sum to 1, and select that fraction of each data set's rows; to mix by probability give "
            "--mixing first_exhausted or all_exhausted"
        )


def _fingerprint(table: TokenTable, lengths: Numbers, selected: Numbers) -> str:
    """Return a digest of the selected rows in order: the tokens, labels and truncated length of each."""
    rows = np.stack([table.digest[selected], lengths[selected]], axis=1)
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()


def _no_rows_error(rows: _RowSelection, report: DataReport, settings: DataSettings) -> DataError:
    if len(rows.table) == 0:
        (first,) = read_skipped_rows(rows.table.skipped, 1)
        return DataError(
            f"no row of {report.name} can be used; the first of {counted(report.bad_rows, 'row')}: {first}",
            hint=first.hint or "Correct it, or set --format and --columns.",
        )
    if len(rows.selected()):
        return DataError(f"the weight of {report.name} takes none of its rows", hint="Give a larger one, such as *1.")
    dropped = rows.too_long & rows.drops_long
    truncated = int(((rows.table.lost > 0) & rows.untrained & ~rows.held_out & ~dropped).sum())
    reasons = [
        f"{number:,} {reason}"
        for number, reason in (
            (report.rows_without_supervision - truncated, "without an answer to train"),
            (truncated, f"only prompt within the first {settings.max_length:,} tokens"),
            (report.dropped_rows, f"longer than {settings.max_length:,} tokens and dropped"),
            (report.held_out_rows, "held out"),
            (report.bad_rows, "that can't be used"),
        )
        if number > 0
    ]
    num_rows = report.rows + report.held_out_rows + report.bad_rows
    return DataError(
        f"no row of {report.name} is left to train on: of {counted(num_rows, 'row')}, {', '.join(reasons)}",
        hint=_no_rows_hint(truncated + report.dropped_rows, report.held_out_rows),
    )


def _no_rows_hint(num_long: int, num_held_out: int) -> str:
    if num_long:
        return "Raise --max-length."
    if num_held_out:
        return (
            "Hold other rows out: a share of them with --eval-split 5%, or those of another file with --eval-dataset."
        )
    return "Look at it with: qlora inspect-data"
