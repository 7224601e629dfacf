"""Read, recognise and tokenize one data set, and cache the tokens."""

import gc
import hashlib
import itertools
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from qlora_cli.cache import code_digests, digest_of, versions_of
from qlora_cli.data.finding.sources import DatasetSource
from qlora_cli.data.opening.layouts import open_rows
from qlora_cli.data.opening.skipped import SkippedRow, bad_row_error, read_skipped_rows
from qlora_cli.data.reading.readers import RawRow, read_rows, resolve_hub, selection_for
from qlora_cli.data.rows.column_formats import RowLayout
from qlora_cli.data.rows.digests import digest_row, digest_text, digest_tokens
from qlora_cli.data.rows.examples import Example, Labelled, Pair, RowError
from qlora_cli.data.rows.groups import NO_GROUP, digest_group
from qlora_cli.data.rows.rows_by_format import read_row, reader_of
from qlora_cli.data.rows.unused_columns import UnusedColumnChecker
from qlora_cli.data.tokenizing import row_notes, store
from qlora_cli.data.tokenizing.store import UNLABELLED, StoredTokens, TokenizedDataset, TokenRow, TokenWriter
from qlora_cli.data.tokenizing.tokens import EncodedText, RenderedText, Rendering, RowTokenizer, Tokens
from qlora_cli.errors import DataError
from qlora_cli.events import Reporter
from qlora_cli.garbage import gc_disabled
from qlora_cli.settings.choices import OnBadRow
from qlora_cli.settings.models import DataSettings

BATCH_ROWS, BATCH_BYTES, BATCHES_AHEAD = 500, 2_000_000, 2
BATCHES_PER_COLLECTION = 8  # of garbage that templates leave in reference cycles
HEAD_ROWS = 1000  # rows of a stream that are prepared before training
VERSIONED_PACKAGES = ("tokenizers", "transformers", "jinja2", "datasets", "pyarrow", "numpy")
# The parts of our own code that tokens depend on.
DATA_CODE = ("limits.py", "finding", "rows", "reading", "opening", "rendering", "tokenizing")
CODE_PARTS = (*(f"data/{part}" for part in DATA_CODE), "settings", "tokenizing")
# The settings that tokens depend on.
TOKEN_SETTINGS = ("format", "columns", "loss_on", "max_length", "accept_lost", "eval_group")


@dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """A tokenizer with its chat template, and the ids that end a text or a turn when the model generates.

    `reporter` is warned if the template is slow.
    """

    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]
    reporter: Reporter


def tokenize_source(
    source: DatasetSource,
    split: str,
    settings: DataSettings,
    text: TextTokenizer,
    seed: int,
    *,
    max_rows: int | None = None,
) -> StoredTokens:
    """Return the tokens of `source`, from the cache if possible; of a stream, those of the first `max_rows` rows.

    Raises:
        DatasetNotFoundError: the hub has no such data set.
        DataError: no row can be read, or one is bad and bad ones are an error.
    """
    before = _file_states(source)
    selection = selection_for(settings, source.name)

    def fill(writer: TokenWriter) -> TokenizedDataset:
        with closing(
            read_rows(source, split=split, seed=seed, streaming=settings.streaming, selection=selection)
        ) as raw:
            rows = raw if max_rows is None else itertools.islice(raw, max_rows)
            with gc_disabled():
                dataset = _tokenize_rows(writer, source.name, rows, settings, text)
        if _file_states(source) != before:
            raise DataError(f"{source.name} was changed while it was read", hint="Run it again.")
        return dataset

    key = _key(source, split, settings, text, seed, max_rows)
    stored = store.load(key) or store.write_tokens(key, fill)
    if stored.about.num_bad and settings.on_bad_row == OnBadRow.ERROR:
        raise bad_row_error(*read_skipped_rows([stored.skipped] if stored.skipped else [], 1))
    return replace(stored, about=replace(stored.about, name=source.name))


def is_tokenized(
    source: DatasetSource, split: str, settings: DataSettings, text: TextTokenizer, seed: int, *, max_rows: int | None
) -> bool:
    """Return whether the tokens of `source` are cached. Raises the errors of `tokenize_source` about its name."""
    return store.load(_key(source, split, settings, text, seed, max_rows)) is not None


def try_rows(layout: RowLayout, rows: Iterable[RawRow], settings: DataSettings, text: TextTokenizer) -> None:
    """Tokenize `rows` to find errors in them.

    Raises:
        DataError: one is bad, and bad ones are an error.
        ModelError: the chat template can't render any.
    """
    for batch in Encoder(layout, settings, text).encode(rows):
        for row in batch:
            if isinstance(row.tokens, RowError) and settings.on_bad_row == OnBadRow.ERROR:
                raise bad_row_error(SkippedRow.from_row(row.raw, row.tokens)) from row.tokens


class EncodedRow(NamedTuple):
    """A row as it was read, its tokens or the error, and the digests of its group and its text."""

    raw: RawRow
    group: int
    tokens: Tokens | RowError
    text_digest: int


class Encoder:
    """Turns raw rows into tokens, in batches; a row that can't be used is returned with its error."""

    def __init__(self, layout: RowLayout, settings: DataSettings, text: TextTokenizer) -> None:
        use_chat = text.tokenizer.chat_template is not None
        self._text = text
        self._group = settings.eval_group
        self._column_checker = UnusedColumnChecker(layout, settings)
        self._bos = text.tokenizer.bos_token_id
        self._starts_with_bos = False
        self._num_without_group = 0
        self.reader = reader_of(layout, settings.loss_on, use_chat=use_chat)
        self.tokenizer = RowTokenizer(
            text.tokenizer,
            settings.loss_on,
            text.end_ids,
            accepts_lost=settings.accept_lost,
            reporter=text.reporter,
        )

    def encode(self, rows: Iterable[RawRow]) -> Iterator[list[EncodedRow]]:
        """Yield the rows in batches and in order, each with its tokens or its error."""
        # Batches are read and rendered while others are encoded, which releases the GIL.
        pending: deque[_PendingBatch] = deque()
        with ThreadPoolExecutor(max_workers=1) as thread:
            for batch in _batches(rows):
                read = [self._read(row) for row in batch]
                rendering = self.tokenizer.render([one for item, _ in read for one in _examples_of(item)])
                pending.append(_PendingBatch(batch, read, rendering, thread.submit(self.tokenizer.encode, rendering)))
                if len(pending) > BATCHES_AHEAD:
                    yield self._finish(pending.popleft())
            while pending:
                yield self._finish(pending.popleft())

    def _finish(self, pending: "_PendingBatch") -> list[EncodedRow]:
        labelled = self.tokenizer.label(pending.rendering, pending.encoded.result())
        done = iter(list(zip(labelled, pending.rendering, strict=True)))
        encoded = [
            EncodedRow(row, group, *_joined(item, list(islice(done, len(_examples_of(item))))))
            for row, (item, group) in zip(pending.rows, pending.read, strict=True)
        ]
        for _, group, tokens, _ in encoded:
            if isinstance(tokens, Tokens):
                self._num_without_group += group == NO_GROUP
                self._starts_with_bos = self._starts_with_bos or bool(tokens.input_ids[0] == self._bos)
        return encoded

    def notes(self) -> tuple[str, ...]:
        """Return notes for the user on the rows so far."""
        return (
            *row_notes.on_ends(self.tokenizer, self._text.tokenizer, self._text.end_ids),
            *row_notes.on_bos(self._text.tokenizer, starts_with_bos=self._starts_with_bos),
            *row_notes.on_control_tokens(self.tokenizer),
            *row_notes.on_dropped_values(self.tokenizer.renderer),
            *row_notes.on_unknown_keys(self.reader, self.tokenizer.renderer),
            *row_notes.on_unread_variables(self.reader, self.tokenizer.renderer),
            *row_notes.on_groups(self._group, self._num_without_group),
        )

    def _read(self, row: RawRow) -> "_ReadRow":
        if row.value is None:
            return _ReadRow(RowError(row.problem or "can't be read"))
        try:
            self._column_checker.check(row.value)
            return _ReadRow(read_row(self.reader, row.value), digest_group(row.value, self._group))
        except RowError as error:
            return _ReadRow(error)


class _ReadRow(NamedTuple):
    """A row as an example or an error, and the digest of its group."""

    example: Example | Labelled | Pair | RowError
    group: int = NO_GROUP


class _PendingBatch(NamedTuple):
    """A batch whose texts are being encoded."""

    rows: list[RawRow]
    read: list[_ReadRow]
    rendering: Rendering
    encoded: "Future[list[EncodedText]]"


def _examples_of(item: Example | Labelled | Pair | RowError) -> tuple[Example, ...]:
    """Return the examples that a row is tokenized as: two of a pair, none of an error."""
    if isinstance(item, Pair):
        return item.chosen, item.rejected
    if isinstance(item, Labelled):
        return (item.answer,)
    return () if isinstance(item, RowError) else (item,)


def _joined(
    item: Example | Labelled | Pair | RowError,
    done: Sequence[tuple[Tokens | RowError, RenderedText | Tokens | RowError]],
) -> tuple[Tokens | RowError, int]:
    """Return the tokens of a row, of those of its examples and their renderings, or its error; and its digest."""
    errors = [one for one in (item, *(tokens for tokens, _ in done)) if isinstance(one, RowError)]
    if errors:
        return errors[0], 0
    sequences = [tokens for tokens, _ in done if isinstance(tokens, Tokens)]
    digest = _text_digest([rendered for _, rendered in done])
    if isinstance(item, Labelled):
        return sequences[0]._replace(is_desirable=item.is_desirable), digest
    return (sequences[0] if len(sequences) == 1 else Tokens.pair_of(*sequences)), digest


def _text_digest(items: Sequence[RenderedText | Tokens | RowError]) -> int:
    texts = [item.text for item in items if isinstance(item, RenderedText)]
    if texts:
        return digest_text("\n".join(texts))
    # Decoding the tokens of a pretokenized row would take far longer than reading it.
    (item,) = items
    return digest_tokens(item.input_ids) if isinstance(item, Tokens) else 0


def _tokenize_rows(
    writer: TokenWriter, name: str, rows: Iterator[RawRow], settings: DataSettings, text: TextTokenizer
) -> TokenizedDataset:
    layout, rows = open_rows(name, rows, settings)
    encoder = Encoder(layout, settings, text)
    files: dict[str, int] = {}
    for number, batch in enumerate(encoder.encode(rows), start=1):
        records = []
        for row, group, tokens, text_digest in batch:
            if isinstance(tokens, RowError):
                if settings.on_bad_row == OnBadRow.ERROR:
                    raise bad_row_error(SkippedRow.from_row(row, tokens)) from tokens
                writer.skip(row, tokens)
                continue
            file = files.setdefault(row.file, len(files))
            records.append(
                _token_row(row, tokens, settings.max_length, file=file, group=group, text_digest=text_digest)
            )
        writer.write(records)
        if len(batch) < BATCH_ROWS or number % BATCHES_PER_COLLECTION == 0:  # after each batch if rows are large
            gc.collect(0)
    return TokenizedDataset(
        name=name,
        format=layout.format.value,
        recognised=layout.describe(),
        files=tuple(files),
        num_rows=writer.num_rows,
        num_bad=writer.num_bad,
        num_empty=writer.num_empty,
        notes=encoder.notes(),
    )


def _token_row(row: RawRow, tokens: Tokens, max_length: int, *, file: int, group: int, text_digest: int) -> TokenRow:
    length, trained = len(tokens.input_ids), tokens.num_trained
    truncated = tokens.truncate(max_length) if tokens.longest > max_length else tokens
    truncated_trained = truncated.num_trained
    return TokenRow(
        input_ids=truncated.input_ids,
        labels=truncated.labels,
        first=truncated.first,
        desirable=UNLABELLED if tokens.is_desirable is None else int(tokens.is_desirable),
        length=length,
        longest=tokens.longest,
        trained=truncated_trained,
        lost=trained - truncated_trained,
        digest=digest_row(tokens.input_ids, tokens.labels, is_desirable=tokens.is_desirable),
        truncated_digest=digest_row(truncated.input_ids, truncated.labels),
        group=group,
        text_digest=text_digest,
        file=file,
        number=row.number,
    )


def _batches(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    """Split rows into batches of a limited number of rows and bytes, so that memory stays bounded."""
    batch: list[RawRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += row.num_bytes
        if len(batch) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _key(
    source: DatasetSource, split: str, settings: DataSettings, text: TextTokenizer, seed: int, max_rows: int | None
) -> str:
    tokenizer = text.tokenizer
    facts: dict[str, Any] = {
        "rows": [source.num_rows, seed if source.num_rows is not None else None, max_rows],
        "content": _content_key(source, split, settings),
        "settings": {name: settings.model_dump(mode="json")[name] for name in TOKEN_SETTINGS},
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
        "day": _day(tokenizer.chat_template),
        "ends": sorted(text.end_ids),
    }
    parts = [json.dumps(facts, sort_keys=True), sys.version, *versions_of(VERSIONED_PACKAGES)]
    return digest_of([*parts, *code_digests(CODE_PARTS)])


def _content_key(source: DatasetSource, split: str, settings: DataSettings) -> list[Any]:
    """Return what identifies the content of a data set: digests or a commit; of a stream, the state of its files."""
    if not source.is_local:
        return [resolve_hub(source), source.config, source.split or split]
    if settings.streaming:
        return _file_states(source)
    return [[str(path), _file_digest(path)] for path in source.files]


def _file_states(source: DatasetSource) -> list[Any]:
    """Return size and times of the files; ctime can't be set back."""
    stats = [(str(path), path.stat()) for path in source.files]
    return [[path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for path, stat in stats]


def _day(template: object) -> str | None:
    """Return today's date if the chat template may write it, as Llama 3.2's does."""
    return date.today().isoformat() if "strftime_now" in json.dumps(template) else None


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
