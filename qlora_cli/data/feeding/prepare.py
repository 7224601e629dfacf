"""From the settings to what is trained and what is held out: tokens and labels, and what became of the rows."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset

from qlora_cli.data.feeding.data_report import Contribution, DataReport
from qlora_cli.data.feeding.held_out import HeldOutChoice, hold_out
from qlora_cli.data.feeding.mixing import mix
from qlora_cli.data.feeding.packing import best_fit, pack
from qlora_cli.data.feeding.stream import MOST_LOST, TokenStream
from qlora_cli.data.feeding.token_table import Mask, Numbers, Table, first_of_each
from qlora_cli.data.finding.sources import DatasetSource
from qlora_cli.data.opening.first_rows import ConfiguredDataset, first_rows_errors
from qlora_cli.data.opening.skipped import bad_row_error, read_skipped_rows
from qlora_cli.data.opening.train_and_eval import eval_split, held_out_sources, source_notes, trained_sources
from qlora_cli.data.rows.groups import NO_GROUP
from qlora_cli.data.tokenizing.encode import HEAD_ROWS, TextTokenizer, is_tokenized, tokenize_source, try_rows
from qlora_cli.errors import DataError
from qlora_cli.settings.choices import Mixing, OnBadRow, OnLong
from qlora_cli.settings.collected import Collected
from qlora_cli.settings.models import DataSettings
from qlora_cli.settings.settle import varied
from qlora_cli.settings.values import held_out_share
from qlora_cli.units import counted


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Rows of `input_ids` and `labels`, both `(seq,)` with seq ≤ max_length, and the report on them.

    `lengths` are those of the rows of `dataset`, int64 `(rows,)`; `share_lost` is that of the tokens to train that are
    lost with what is too long, each row counted once. `table` and `selected` are where they come from:
    all rows that were read, and the places of those that are fed, packed or not. With a `stream`, whose rows are
    read while they are trained, all else is about its first rows.
    """

    dataset: Dataset
    stream: TokenStream | None = None
    lengths: Numbers
    share_lost: float
    report: DataReport
    notes: tuple[str, ...]
    skipped: tuple[Path, ...]
    table: Table
    selected: Numbers


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What is trained, and what is held out for evaluation, which never overlap."""

    train: PreparedData
    evaluation: PreparedData | None


def prepare_data(settings: DataSettings, text: TextTokenizer, *, seed: int, only_look: bool = False) -> TrainingData:
    """Read, recognise, tokenize, cut, select and mix the rows that `settings` name.

    `only_look` goes on where training would be refused; `refusals` tells why it would be.

    Raises:
        DatasetNotFoundError: no such data set.
        DataError: it can't be read, a row is wrong (named by file and number), more is lost than is accepted, or
            no row is left.
    """
    if only_look:
        settings = varied(settings, on_bad_row=OnBadRow.SKIP)
    sources = trained_sources(settings)
    if len(sources) + len(held_out_sources(settings)) > 1:
        _check_first_rows(settings, text, seed)
    head = HEAD_ROWS if settings.streaming else None
    table = _read(sources, settings.split, settings, text, seed, head)
    rows = _PreparedRows.of(table, settings)
    evaluation, held_out, notes = None, HeldOutChoice(), []
    if settings.eval_dataset is not None or settings.eval_split is not None:
        held_rows = _held_out_rows(rows, settings, text, seed)
        evaluation = _prepared(held_rows, held_rows.fed(), settings, is_part=held_rows.table is table)
        held_out = HeldOutChoice.of(evaluation.table, evaluation.selected)
        rows = rows.without(held_out.among(table))
        notes = _notes_on_part(rows, held_rows, settings) if held_rows.table is table else []
    fed = rows.fed()
    if len(fed) and not settings.streaming:  # which mixes what it reads itself
        fed = mix(fed, table.source[fed], sources, settings.mixing, seed)
    train = _prepared(rows, fed, settings)
    train = replace(train, notes=(*train.notes, *notes, *_notes_on_mixture(train.report, sources, settings)))
    if evaluation is not None:
        num_near = len(near_duplicates(train, evaluation))
        evaluation = replace(evaluation, report=replace(evaluation.report, near_duplicate_rows=num_near))
    for prepared in (train, evaluation):
        if prepared is not None and not only_look:
            for refusal in refusals(prepared, settings):
                raise refusal
    if settings.streaming:
        train = replace(
            _streamed(train, sources), stream=TokenStream(sources, settings, text, seed=seed, held_out=held_out)
        )
    elif settings.packing:
        train = _packed(train, settings.max_length)
    train = replace(train, notes=(*source_notes(sources, held_out_sources(settings)), *train.notes))
    return TrainingData(train=train, evaluation=evaluation)


def near_duplicates(train: PreparedData, evaluation: PreparedData) -> Numbers:
    """Return the places of held-out rows that a trained one equals but for case, punctuation and spaces."""
    trained, held_out = (data.table.text_digest[data.selected] for data in (train, evaluation))
    return evaluation.selected[np.isin(held_out, trained)]


def refusals(data: PreparedData, settings: DataSettings) -> list[DataError]:
    """Return why `settings` do not allow to train on `data`, if they do not."""
    report, found = data.report, []
    if report.bad_rows and settings.on_bad_row == OnBadRow.ERROR:
        found.append(bad_row_error(*read_skipped_rows(data.skipped, 1)))
    num_long = report.truncated_rows + report.dropped_rows
    longest = f"the longest row has {int(data.table.length.max()):,} tokens"
    if num_long and settings.on_long == OnLong.ERROR:
        first = int(np.flatnonzero(data.table.length > settings.max_length)[0])
        others = f", as {counted(num_long - 1, 'other row')}" if num_long > 1 else ""
        found.append(
            DataError(
                f"{data.table.where(first)}: {int(data.table.length[first]):,} tokens, more than --max-length "
                f"{settings.max_length:,}{others}",
                hint=f"Raise --max-length ({longest}), or use --on-long truncate or drop.",
            )
        )
    elif data.share_lost > MOST_LOST and not settings.accept_lost:
        found.append(
            DataError(
                f"{report.name}: {100 * data.share_lost:.1f} % of the tokens to train are lost with rows longer than "
                f"{settings.max_length:,} tokens ({report.supervised_tokens_lost:,} in {counted(num_long, 'row')})",
                hint=f"Raise --max-length ({longest}), or accept it with --accept-lost.",
            )
        )
    return found


@dataclass(frozen=True)
class _PreparedRows:
    """What becomes of each row of a table; every array is bool `(rows,)`."""

    table: Table
    too_long: Mask
    drops_long: bool
    without_supervision: Mask
    repeated: Mask
    drops_repeated: bool
    held_out: Mask

    @classmethod
    def of(cls, table: Table, settings: DataSettings) -> "_PreparedRows":
        return cls(
            table=table,
            too_long=table.length > settings.max_length,
            drops_long=settings.on_long == OnLong.DROP,
            without_supervision=table.supervised == 0,
            repeated=~first_of_each(table.digest),
            drops_repeated=settings.drop_duplicates,
            held_out=np.zeros(len(table), dtype=bool),
        )

    def without(self, held_out: Mask) -> "_PreparedRows":
        """Return the same with other rows held out."""
        return replace(self, held_out=held_out)

    @property
    def usable(self) -> Mask:
        """Rows with a token to train that are not too long, where those are dropped."""
        return ~self.without_supervision & ~(self.too_long & self.drops_long)

    def fed(self) -> Numbers:
        """Return the places of the rows that are fed."""
        return np.flatnonzero(self.usable & ~(self.repeated & self.drops_repeated) & ~self.held_out)


def _read(
    sources: Sequence[DatasetSource],
    split: str,
    settings: DataSettings,
    text: TextTokenizer,
    seed: int,
    head: int | None = None,
) -> Table:
    return Table([tokenize_source(source, split, settings, text, seed, head=head) for source in sources])


def _check_first_rows(settings: DataSettings, text: TextTokenizer, seed: int) -> None:
    """Check that each data set can be read, before the first is tokenized as a whole.

    Raises:
        DataError: one can't.
        SettingsError: several can't.
    """

    def is_to_be_read(dataset: ConfiguredDataset) -> bool:
        head = HEAD_ROWS if settings.streaming and dataset.is_trained else None
        is_done = is_tokenized(dataset.source, dataset.split, settings, text, seed, head=head)
        return dataset.source.is_local or not is_done

    wrong = Collected()
    look = partial(try_rows, settings=settings, text=text)
    wrong.extend(first_rows_errors(settings, seed, include=is_to_be_read, check_rows=look))
    wrong.raise_found()


def _held_out_rows(rows: _PreparedRows, settings: DataSettings, text: TextTokenizer, seed: int) -> _PreparedRows:
    """Return what becomes of the rows that are held out: a part of `rows`, or data sets of their own."""
    unit = rows.table.unit
    candidates = unit[rows.usable]
    num_requested = _num_wanted(settings, len(candidates))
    if num_requested is not None and len(candidates) == 0:
        raise _nothing_left(rows, _report(rows, rows.fed(), settings), settings)
    if num_requested is None:
        return _PreparedRows.of(_read_held_out(settings, text, seed), settings)
    if num_requested >= len(candidates):
        raise _not_held_out(settings, f"there are {len(candidates):,} that can be used")
    chosen = candidates[hold_out(candidates, num_requested, seed)]
    if len(chosen) == 0:
        group = settings.eval_group
        raise _not_held_out(settings, "they are all equal" if group is None else f"they are all of one {group!r}")
    return rows.without(~np.isin(unit, chosen))


def _num_wanted(settings: DataSettings, num_rows: int) -> int | None:
    """Return how many of the rows that can be used are to be held out; None if they are not drawn from them."""
    share = held_out_share(settings.eval_split) if settings.eval_split is not None else None
    return max(1, round(share * num_rows)) if isinstance(share, float) else share


def _notes_on_part(rows: _PreparedRows, part: _PreparedRows, settings: DataSettings) -> list[str]:
    """Return what is to be said of a part of the rows that is held out; `rows` is the other one."""
    together = "that are equal" if settings.eval_group is None else f"of one {settings.eval_group!r}"
    num_held = int((part.usable & ~part.held_out).sum())
    num_requested = _num_wanted(settings, int(rows.usable.sum()))
    notes = []
    if num_requested is not None and abs(num_held - num_requested) > num_requested / 2:
        notes.append(
            f"{counted(num_held, 'row')} held out, where {settings.eval_split} would be {num_requested:,}: "
            f"rows {together} are kept together"
        )
    if num_equal := int((rows.usable & rows.held_out & part.held_out).sum()):
        other = f"with another {settings.eval_group!r}"
        notes.append(
            f"{counted(num_equal, 'row')} neither trained nor held out: equal to one that is held out {other}"
        )
    return notes


def _not_held_out(settings: DataSettings, why: str) -> DataError:
    return DataError(
        f"{settings.eval_split} can't be held out of {', '.join(settings.dataset)} with rows left to train: {why}",
        hint="Hold out fewer, or name held-out rows with --eval-dataset.",
        setting="data.eval_split",
    )


def _read_held_out(settings: DataSettings, text: TextTokenizer, seed: int) -> Table:
    return _read(held_out_sources(settings), eval_split(settings), settings, text, seed)


def _prepared(rows: _PreparedRows, fed: Numbers, settings: DataSettings, *, is_part: bool = False) -> PreparedData:
    """Return rows as they are fed; `is_part`: of a table that is read, and reported on, for training."""
    table, here = rows.table, ~rows.held_out
    report = _report(rows, fed, settings)
    if is_part:
        report = replace(report, bad_rows=0, empty_answers=0, held_out_rows=0)
    if len(fed) == 0:
        raise _nothing_left(rows, report, settings)
    return PreparedData(
        dataset=table.dataset.select_columns(["input_ids", "labels"]).select(fed),
        lengths=np.minimum(table.length, settings.max_length)[fed],
        share_lost=report.supervised_tokens_lost / int((table.supervised + table.lost)[here].sum()),
        report=report,
        notes=() if is_part else tuple(dict.fromkeys(note for about in table.about for note in about.notes)),
        skipped=() if is_part else table.skipped,
        table=table,
        selected=fed,
    )


def _streamed(data: PreparedData, sources: Sequence[DatasetSource]) -> PreparedData:
    first = counted(data.report.rows, "row")
    notes = [f"{data.report.name} is streamed: what is said about it is about the first {first}"]
    if len(sources) > 1:
        total = sum(source.weight for source in sources)
        shares = ", ".join(f"{float(source.weight / total):.1%} {source.name}" for source in sources)
        notes.append(f"each row of the stream is drawn by chance: {shares}")
    return replace(data, notes=(*notes, *data.notes))


def _packed(data: PreparedData, max_length: int) -> PreparedData:
    bins = best_fit(data.lengths, max_length)
    return replace(
        data,
        dataset=pack(data.dataset, bins),
        lengths=np.array([data.lengths[rows].sum() for rows in bins]),
        report=replace(data.report, packed_rows=len(bins)),
    )


def _report(rows: _PreparedRows, fed: Numbers, settings: DataSettings) -> DataReport:
    table, here = rows.table, ~rows.held_out
    kept = np.minimum(table.length, settings.max_length)
    dropped = here & rows.too_long & rows.drops_long
    cut = here & rows.too_long & ~dropped
    return DataReport(
        name=", ".join(about.name for about in table.about),
        format=", ".join(dict.fromkeys(about.format for about in table.about)),
        recognised=", ".join(dict.fromkeys(about.recognised for about in table.about)),
        rows=int(here.sum()),
        rows_trained=len(fed),
        tokens=int(kept[fed].sum()),
        supervised_tokens=int(table.supervised[fed].sum()),
        longest_row_tokens=int(kept[fed].max(initial=0)),
        truncated_rows=int(cut.sum()),
        dropped_rows=int(dropped.sum()),
        tokens_lost=int((table.length - kept)[cut].sum() + table.length[dropped].sum()),
        supervised_tokens_lost=int(table.lost[cut].sum() + (table.supervised + table.lost)[dropped].sum()),
        rows_without_supervision=int((here & ~dropped & rows.without_supervision).sum()),
        duplicate_rows=int((here & rows.repeated).sum()),
        duplicates_dropped=int((here & rows.usable & rows.repeated & rows.drops_repeated).sum()),
        held_out_rows=int(rows.held_out.sum()),
        near_duplicate_rows=None,
        groups=None if settings.eval_group is None else len(np.setdiff1d(table.group[fed], [NO_GROUP])),
        bad_rows=sum(about.num_bad for about in table.about),
        empty_answers=sum(about.num_empty for about in table.about),
        mixture=tuple(_contributions(table, fed)),
        packed_rows=None,
        fingerprint=_fingerprint(table, kept, fed),
    )


def _contributions(table: Table, fed: Numbers) -> Iterator[Contribution]:
    source, supervised = table.source[fed], table.supervised[fed]
    for place, about in enumerate(table.about):
        own = source == place
        num_rows, num_tokens = int(own.sum()), int(supervised[own].sum())
        share = num_rows / max(1, len(fed))
        yield Contribution(name=about.name, rows=num_rows, share=share, supervised_tokens=num_tokens)


def _notes_on_mixture(report: DataReport, sources: Sequence[DatasetSource], settings: DataSettings) -> Iterator[str]:
    if settings.streaming or len(sources) == 1:
        return
    yield from (f"no row of {part.name} is fed" for part in report.mixture if part.rows == 0)
    if settings.mixing == Mixing.WEIGHTS and sum(source.weight for source in sources) == 1:
        yield (
            "the weights come to 1, and take that part of each data set's rows; to mix by probability give "
            "--mixing first_exhausted or all_exhausted"
        )


def _fingerprint(table: Table, kept: Numbers, fed: Numbers) -> str:
    """Return a digest of the rows that are fed, in order: of each its tokens and labels, and where it is cut."""
    rows = np.stack([table.digest[fed], kept[fed]], axis=1)
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()


def _nothing_left(rows: _PreparedRows, report: DataReport, settings: DataSettings) -> DataError:
    if len(rows.table) == 0:
        (first,) = read_skipped_rows(rows.table.skipped, 1)
        return DataError(
            f"no row of {report.name} can be used; the first of {counted(report.bad_rows, 'row')}: {first}",
            hint=first.hint or "Correct it, or say with --format and --columns how rows are to be read.",
        )
    if len(rows.fed()):
        return DataError(f"the weight of {report.name} takes none of its rows", hint="Give a larger one, such as *1.")
    dropped = rows.too_long & rows.drops_long
    cut = int(((rows.table.lost > 0) & rows.without_supervision & ~rows.held_out & ~dropped).sum())
    reasons = [
        f"{number:,} {why}"
        for number, why in (
            (report.rows_without_supervision - cut, "without an answer to train"),
            (cut, f"only prompt within the first {settings.max_length:,} tokens"),
            (report.dropped_rows, f"longer than {settings.max_length:,} tokens and dropped"),
            (report.held_out_rows, "held out"),
            (report.bad_rows, "that can't be used"),
        )
        if number > 0
    ]
    num_rows = report.rows + report.held_out_rows + report.bad_rows
    return DataError(
        f"no row of {report.name} is left to train: of {counted(num_rows, 'row')}, {', '.join(reasons)}",
        hint=_hint_for_nothing(cut + report.dropped_rows, report.held_out_rows),
    )


def _hint_for_nothing(num_long: int, num_held_out: int) -> str:
    if num_long:
        return "Raise --max-length."
    if num_held_out:
        return (
            "Hold other rows out: a share of them with --eval-split 5%, or those of another file with --eval-dataset."
        )
    return "Look at it with: qlora inspect-data"
