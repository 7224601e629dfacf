"""From the settings to what is trained and what is held out: tokens and labels, and what became of the rows."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset

from qlora_cli.data.encode import TextTokenizer, tokenize_source
from qlora_cli.data.packing import best_fit, pack
from qlora_cli.data.report import DataReport
from qlora_cli.data.sources import DatasetSource, find_dataset
from qlora_cli.data.stream import TokenStream
from qlora_cli.data.table import Mask, Numbers, Table, first_of_each, hold_out, repeat_by_weight
from qlora_cli.errors import DataError
from qlora_cli.settings.models import DataSettings, OnLong, held_out_share
from qlora_cli.units import counted

MOST_LOST = 0.01  # of the tokens to train; more is an error unless it is accepted
EVAL_SPLIT = "test"


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Rows of `input_ids` and `labels`, both `(seq,)` with seq ≤ max_length, and the report on them.

    `lengths` are those of the rows of `dataset`, int64 `(rows,)`. `table` and `selected` are where they come from:
    all rows that were read, and the places of those that are fed, packed or not. With a `stream`, whose rows are
    read while they are trained, all else is about its first rows.
    """

    dataset: Dataset
    stream: TokenStream | None = None
    lengths: Numbers
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


def prepare_data(settings: DataSettings, text: TextTokenizer, *, seed: int) -> TrainingData:
    """Read, recognise, tokenize, cut, select and mix the rows that `settings` name.

    Raises:
        DatasetNotFoundError: no such data set.
        DataError: it can't be read, a row is wrong (named by file and number), more is lost than is accepted, or
            no row is left.
    """
    sources = [find_dataset(name) for name in settings.dataset]
    table = _read(sources, settings.split, settings, text, seed)
    rows = _Rows.of(table, settings)
    evaluation = None
    if settings.eval_dataset is not None or settings.eval_split is not None:
        held_table, held_rows, held_out = _hold_out(table, rows, settings, text, seed)
        evaluation = _prepared(held_table, held_rows, held_rows.fed(), settings, num_held_out=0)
        rows = rows.without(held_out)
    fed = repeat_by_weight(rows.fed(), table.source, [source.weight for source in sources], seed)
    num_held_out = int(rows.held_out.sum())
    train = _prepared(table, rows, fed, settings, num_held_out=num_held_out)
    if settings.streaming:
        return TrainingData(train=_streamed(train, sources, settings, text, seed), evaluation=evaluation)
    return TrainingData(
        train=_packed(train, settings.max_length) if settings.packing else train, evaluation=evaluation
    )


@dataclass(frozen=True)
class _Rows:
    """What becomes of each row of a table; every array is bool `(rows,)`."""

    table: Table
    too_long: Mask
    drops_long: bool
    without_supervision: Mask
    repeated: Mask
    drops_repeated: bool
    held_out: Mask

    @classmethod
    def of(cls, table: Table, settings: DataSettings) -> "_Rows":
        too_long = table.length > settings.max_length
        if settings.on_long == OnLong.ERROR and too_long.any():
            raise _too_long(table, too_long, settings.max_length)
        return cls(
            table=table,
            too_long=too_long,
            drops_long=settings.on_long == OnLong.DROP,
            without_supervision=table.supervised == 0,
            repeated=~first_of_each(table.digest),
            drops_repeated=settings.drop_duplicates,
            held_out=np.zeros(len(table), dtype=bool),
        )

    def without(self, held_out: Mask) -> "_Rows":
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
    sources: Sequence[DatasetSource], split: str, settings: DataSettings, text: TextTokenizer, seed: int
) -> Table:
    return Table([tokenize_source(source, split, settings, text, seed) for source in sources])


def _hold_out(
    table: Table, rows: _Rows, settings: DataSettings, text: TextTokenizer, seed: int
) -> tuple[Table, _Rows, Mask]:
    """Return the held-out rows, as a table and what becomes of them, and which rows of `table` are not trained."""
    share = held_out_share(settings.eval_split) if settings.eval_split is not None else None
    if share is None:
        named = settings.eval_dataset or settings.dataset
        held_sources = [find_dataset(name) for name in named]
        whole = settings.model_copy(update={"streaming": False})
        held = _read(held_sources, settings.eval_split or EVAL_SPLIT, whole, text, seed)
        held_rows = _Rows.of(held, settings)
        return held, held_rows, np.isin(table.digest, held.digest[held_rows.usable])
    usable = rows.usable
    wanted = max(1, round(share * int(usable.sum()))) if isinstance(share, float) else share
    if wanted >= int(usable.sum()):
        raise DataError(
            f"--eval-split {settings.eval_split} leaves nothing to train on: {', '.join(settings.dataset)} has "
            f"{int(usable.sum()):,} rows that can be used",
            hint="Hold out fewer.",
        )
    held_out = np.zeros(len(table), dtype=bool)
    held_out[usable] = hold_out(table.digest[usable], wanted, seed)
    # Equal rows are on one side, so what is held out is never trained.
    return table, rows.without(~held_out), held_out


def _prepared(table: Table, rows: _Rows, fed: Numbers, settings: DataSettings, *, num_held_out: int) -> PreparedData:
    report = _report(table, rows, fed, settings.max_length, num_held_out)
    if len(fed) == 0:
        raise _nothing_left(report, settings)
    lost = report.supervised_tokens_lost / (report.supervised_tokens_lost + report.supervised_tokens)
    if lost > MOST_LOST and not settings.accept_lost:
        raise DataError(
            f"{report.name}: {100 * lost:.1f} % of the tokens to train are lost with rows longer than "
            f"{settings.max_length:,} tokens ({report.supervised_tokens_lost:,} in "
            f"{counted(report.truncated_rows + report.dropped_rows, 'row')})",
            hint=f"Raise --max-length (the longest row has {int(table.length.max()):,} tokens), or accept it with "
            "--accept-lost.",
        )
    return PreparedData(
        dataset=table.dataset.select_columns(["input_ids", "labels"]).select(fed),
        lengths=np.minimum(table.length, settings.max_length)[fed],
        report=report,
        notes=tuple(note for about in table.about for note in about.notes),
        skipped=table.skipped,
        table=table,
        selected=fed,
    )


def _streamed(
    data: PreparedData, sources: Sequence[DatasetSource], settings: DataSettings, text: TextTokenizer, seed: int
) -> PreparedData:
    note = f"{data.report.name} is streamed: what is said about it is about the first {data.report.rows:,} rows"
    stream = TokenStream(sources, settings, text, seed=seed)
    return replace(data, stream=stream, notes=(note, *data.notes))


def _packed(data: PreparedData, max_length: int) -> PreparedData:
    bins = best_fit(data.lengths, max_length)
    return replace(
        data,
        dataset=pack(data.dataset, bins),
        lengths=np.array([data.lengths[rows].sum() for rows in bins]),
        report=replace(data.report, packed_rows=len(bins)),
    )


def _report(table: Table, rows: _Rows, fed: Numbers, max_length: int, num_held_out: int) -> DataReport:
    kept = np.minimum(table.length, max_length)
    here = ~rows.held_out
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
        held_out_rows=num_held_out,
        bad_rows=sum(about.num_bad for about in table.about),
        empty_answers=sum(about.num_empty for about in table.about),
        packed_rows=None,
        fingerprint=_fingerprint(table, kept, fed),
    )


def _fingerprint(table: Table, kept: Numbers, fed: Numbers) -> str:
    """Return a digest of the rows that are fed, in order: of each its tokens and labels, and where it is cut."""
    rows = np.stack([table.digest[fed], kept[fed]], axis=1)
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()


def _too_long(table: Table, too_long: Mask, max_length: int) -> DataError:
    first = int(np.flatnonzero(too_long)[0])
    return DataError(
        f"{table.where(first)}: {int(table.length[first]):,} tokens, more than --max-length {max_length:,}; so have "
        f"{counted(int(too_long.sum()) - 1, 'other row')}",
        hint=f"Raise --max-length (the longest has {int(table.length.max()):,}), or use --on-long truncate or drop.",
    )


def _nothing_left(report: DataReport, settings: DataSettings) -> DataError:
    reasons = [
        f"{number:,} {why}"
        for number, why in (
            (report.rows_without_supervision, f"are only prompt within the first {settings.max_length:,} tokens"),
            (report.dropped_rows, f"are longer than {settings.max_length:,} tokens and dropped"),
            (report.held_out_rows, "are held out"),
            (report.bad_rows, "can't be used"),
        )
        if number
    ]
    return DataError(
        f"no row of {report.name} has a token to train: of {report.rows + report.held_out_rows + report.bad_rows:,} "
        f"rows {', '.join(reasons)}",
        hint="Raise --max-length, or check that the rows hold answers.",
    )
