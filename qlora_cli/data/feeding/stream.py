"""Rows that are read and tokenized during training, for data sets that do not fit on the disk.

Only the first rows of a stream are known beforehand: they are prepared like any other data, recognised, counted and
shown. Then the stream itself is read in windows, which are shuffled, and packed if the settings say so; a data set
restarts when it ends, until training has done its steps.
"""

import json
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Features, IterableDataset, List, Value

from qlora_cli.data.feeding.held_out import HeldOutDigests
from qlora_cli.data.feeding.packing import best_fit
from qlora_cli.data.finding.sources import DatasetSource
from qlora_cli.data.limits import MAX_BAD_ROWS_LISTED
from qlora_cli.data.opening.layouts import open_rows
from qlora_cli.data.opening.skipped import SkippedRow, bad_row_error
from qlora_cli.data.reading.readers import read_rows, selection_for
from qlora_cli.data.rows.digests import digest_row
from qlora_cli.data.rows.examples import RowError
from qlora_cli.data.tokenizing.encode import EncodedRow, Encoder, TextTokenizer
from qlora_cli.data.tokenizing.tokens import Tokens
from qlora_cli.errors import DataError
from qlora_cli.settings.choices import OnBadRow, OnLong
from qlora_cli.settings.models import DataSettings
from qlora_cli.units import counted
from qlora_cli.writing import append_line

WINDOW_ROWS = 2000
MAX_LOST_SHARE = 0.01  # of the tokens to train, checked after each window
# Descriptions of the counts of rows that are not fed, or not whole.
OUTCOMES = {
    "truncated": "truncated",
    "dropped": "too long and dropped",
    "without_supervision": "without a token to train",
    "held_out": "held out",
    "bad": "that can't be used",
}
Row = dict[str, list[int]]


class TokenStream:
    """An endless stream of rows of `input_ids` and `labels`, each `(seq,)` with seq ≤ max_length.

    With several data sets, each row comes from a random one, with a probability proportional to its weight. Rows that
    are equal to a `held_out` one, or of its group, are not fed. Rows that can't be used are listed in `skipped_file`,
    if it is set.
    """

    def __init__(
        self,
        sources: Sequence[DatasetSource],
        settings: DataSettings,
        text: TextTokenizer,
        *,
        seed: int,
        held_out: HeldOutDigests,
    ) -> None:
        self.skipped_file: Path | None = None
        self._sources = sources
        self._settings = settings
        self._text = text
        self._seed = seed
        self._held_out = held_out
        self._source_streams: tuple[_SourceStream, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        # `datasets` pickles what it iterates over for a fingerprint, which nothing uses.
        return {"names": [source.name for source in self._sources]}

    @property
    def counts(self) -> Counter[str]:
        """Counts of the rows read since iteration began, which is ahead of the rows fed.

        `read`, `truncated`, `dropped`, `without_supervision`, `held_out`, `bad`, `supervised_tokens` and, of them,
        `supervised_tokens_lost`; and `near_duplicate`, the held-out rows that a row read nearly equals.
        """
        counts = sum((stream.counts for stream in self._source_streams), Counter[str]())
        near_duplicates = frozenset[int]().union(*(stream.near_duplicates for stream in self._source_streams))
        return counts + Counter(near_duplicate=sum(self._held_out.texts[text] for text in near_duplicates))

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user on the rows read since iteration began, each row counted once."""
        return tuple(dict.fromkeys(note for part in self._source_streams for note in part.notes))

    def as_dataset(self) -> IterableDataset:
        """Return the stream as an iterable data set for a trainer."""
        columns = ["input_ids", "labels", *(["seq_lengths"] if self._settings.packing else [])]
        features = Features(dict.fromkeys(columns, List(Value("int32"))))
        return IterableDataset.from_generator(self.__iter__, features=features)

    def __iter__(self) -> Iterator[Row]:
        if self.skipped_file is not None:
            self.skipped_file.unlink(missing_ok=True)
        self._source_streams = tuple(self._source_stream(source) for source in self._sources)
        rng = np.random.default_rng(self._seed)
        weights = np.array([float(source.weight) for source in self._sources])
        streams = [part.rows() for part in self._source_streams]
        try:
            while True:
                drawn = rng.choice(len(streams), WINDOW_ROWS, p=weights / weights.sum())
                window = [next(streams[index]) for index in drawn]
                self._check_lost()
                yield from self._window([window[index] for index in rng.permutation(WINDOW_ROWS)])
        finally:
            for stream in streams:
                stream.close()

    def _source_stream(self, source: DatasetSource) -> "_SourceStream":
        return _SourceStream(source, self._settings, self._text, self._seed, self._held_out, self.skipped_file)

    def _window(self, rows: Sequence[Tokens]) -> Iterator[Row]:
        if not self._settings.packing:
            yield from ({"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()} for row in rows)
            return
        lengths = np.array([len(row.input_ids) for row in rows])
        for indices in best_fit(lengths, self._settings.max_length):
            yield {
                "input_ids": np.concatenate([rows[index].input_ids for index in indices]).tolist(),
                "labels": np.concatenate([rows[index].labels for index in indices]).tolist(),
                "seq_lengths": [int(lengths[index]) for index in indices],
            }

    def _check_lost(self) -> None:
        counts = self.counts
        lost = counts["supervised_tokens_lost"] / max(1, counts["supervised_tokens"])
        if lost > MAX_LOST_SHARE and not self._settings.accept_lost:
            raise DataError(
                f"{100 * lost:.1f} % of the tokens to train are lost with rows longer than "
                f"{self._settings.max_length:,} tokens, of the {counts['read']:,} rows of the stream so far",
                hint="Raise --max-length, or accept it with --accept-lost.",
            )


class _SourceStream:
    """The rows of one data set of a stream. `near_duplicates`: digests of held-out texts nearly equal to a fed one."""

    def __init__(
        self,
        source: DatasetSource,
        settings: DataSettings,
        text: TextTokenizer,
        seed: int,
        held_out: HeldOutDigests,
        skipped_file: Path | None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.near_duplicates: set[int] = set()
        self._source = source
        self._settings = settings
        self._text = text
        self._seed = seed
        self._held_out = held_out
        self._skipped_file = skipped_file
        self._first_pass: Encoder | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user on the rows of the first pass."""
        return () if self._first_pass is None else self._first_pass.notes()

    def rows(self) -> Generator[Tokens]:
        """Yield the rows to feed, pass after pass."""
        is_first = True
        while True:
            has_rows = False
            for row in self._pass(is_first=is_first):
                has_rows = True
                yield row
            if not has_rows:
                raise self._no_rows_error()
            is_first = False

    def _pass(self, *, is_first: bool) -> Iterator[Tokens]:
        source, settings = self._source, self._settings
        selection = selection_for(settings, source.name)
        with closing(
            read_rows(source, split=settings.split, seed=self._seed, streaming=True, selection=selection)
        ) as raw:
            layout, rows = open_rows(source.name, raw, settings)
            encoder = Encoder(layout, settings, self._text)
            self._first_pass = self._first_pass or encoder
            for batch in encoder.encode(rows):
                for row in batch:
                    self.counts["read"] += 1
                    if isinstance(row.tokens, RowError):
                        self._skip(SkippedRow.from_row(row.raw, row.tokens), is_first=is_first)
                    elif (truncated := self._trained_tokens(row, row.tokens)) is not None:
                        yield truncated

    def _skip(self, row: SkippedRow, *, is_first: bool) -> None:
        if self._settings.on_bad_row == OnBadRow.ERROR:
            raise bad_row_error(row)
        self.counts["bad"] += 1
        if is_first and self._skipped_file is not None and self.counts["bad"] <= MAX_BAD_ROWS_LISTED:
            append_line(self._skipped_file, json.dumps(asdict(row)))

    def _trained_tokens(self, row: EncodedRow, tokens: Tokens) -> Tokens | None:
        """Return the tokens of a row to feed; None if it is not fed."""
        settings, length = self._settings, len(tokens.input_ids)
        truncated = tokens.truncate(settings.max_length)
        if self._held_out.contains(digest_row(truncated.input_ids, truncated.labels), row.group):
            self.counts["held_out"] += 1
            return None
        self.counts["supervised_tokens"] += tokens.num_trained
        if length > settings.max_length:
            if settings.on_long == OnLong.ERROR:
                where = f"{row.raw.file}, row {row.raw.number}"
                raise DataError(
                    f"{where}: {length:,} tokens, more than --max-length {settings.max_length:,}",
                    hint="Raise --max-length, or use --on-long truncate or drop.",
                )
            is_dropped = settings.on_long == OnLong.DROP
            self.counts["dropped" if is_dropped else "truncated"] += 1
            remaining = 0 if is_dropped else truncated.num_trained
            self.counts["supervised_tokens_lost"] += tokens.num_trained - remaining
            if is_dropped:
                return None
        if truncated.num_trained == 0:
            self.counts["without_supervision"] += 1
            return None
        if row.text_digest in self._held_out.texts:
            self.near_duplicates.add(row.text_digest)
        return truncated

    def _no_rows_error(self) -> DataError:
        reasons = ", ".join(
            f"{self.counts[name]:,} {description}" for name, description in OUTCOMES.items() if self.counts[name]
        )
        return DataError(
            f"no row of {self._source.name} is left to train on: of {counted(self.counts['read'], 'row')}, {reasons}",
            hint="Look at it with: qlora inspect-data",
        )
