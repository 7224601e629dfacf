"""Turn a data set into what the trainer is fed, and count what was cut and dropped on the way."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, Sequence, Value
from transformers import PreTrainedTokenizerBase

from qlora_cli.data.formats import Conversation, RowError, read_row, recognise
from qlora_cli.data.read import read_rows
from qlora_cli.data.sources import find_dataset
from qlora_cli.data.tokens import Tokens, encode, truncate
from qlora_cli.errors import DataError
from qlora_cli.settings.models import DataFormat, DataSettings, LossOn


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What became of a data set's rows; counts are of rows or of tokens, as named."""

    name: str
    format: DataFormat
    num_rows: int
    num_tokens: int
    num_supervised_tokens: int
    longest_row_tokens: int
    num_truncated_rows: int
    num_dropped_rows: int
    num_lost_supervised_tokens: int
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Rows of `input_ids` and `labels`, both `(seq,)` with seq ≤ max_length, and the report on them."""

    dataset: Dataset
    report: DataReport


def prepare_data(name: str, split: str, settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """Read, recognise, tokenize, cut at `settings.max_length`, and drop rows without a trained token.

    Raises:
        DatasetNotFoundError: no such data set.
        DataError: it can't be read, a row is wrong (named by number), or no row is left.
    """
    source = find_dataset(name)
    rows = read_rows(source, split)
    fmt = recognise(rows.column_names, settings.format, name)
    encoder = _Encoder(name, fmt, settings, tokenizer)
    # Kept in memory and never cached: a stale cache is impossible.
    encoded = rows.map(
        encoder,
        with_indices=True,
        remove_columns=rows.column_names,
        features=Features(
            input_ids=Sequence(Value("int32")),
            labels=Sequence(Value("int32")),
            cut=Value("bool"),
            lost=Value("int64"),
        ),
        keep_in_memory=True,
        load_from_cache_file=False,
    )
    return _report(name, fmt, encoded, num_rows=len(rows), max_length=settings.max_length)


class _Encoder:
    """Encodes one row; named by number when it is wrong."""

    def __init__(self, name: str, fmt: DataFormat, settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        self._name = name
        self._format = fmt
        self._max_length = settings.max_length
        self._all_tokens = settings.loss_on == LossOn.ALL
        self._tokenizer = tokenizer

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        whole = self._encode(row, index)
        kept = truncate(whole, self._max_length)
        return {
            "input_ids": kept.input_ids,
            "labels": kept.labels,
            "cut": len(kept.input_ids) < len(whole.input_ids),
            "lost": whole.num_supervised - kept.num_supervised,
        }

    def _encode(self, row: Mapping[str, Any], index: int) -> Tokens:
        use_chat = self._tokenizer.chat_template is not None
        try:
            example = read_row(row, self._format, use_chat=use_chat)
            if isinstance(example, Conversation) and not use_chat:
                raise DataError(
                    f"{self._name} holds conversations, but the tokenizer has no chat template",
                    hint="Give one with --chat-template (a .jinja file, or chatml), take the instruct version of the "
                    "model, or write rows as prompt and completion.",
                )
            return encode(example, self._tokenizer, all_tokens=self._all_tokens)
        except RowError as error:
            raise DataError(
                f"{self._name}, row {index + 1}: {error}",
                hint=f"The file is read as {self._format.value}; --set data.format=NAME reads it as another.",
            ) from error


def _report(name: str, fmt: DataFormat, encoded: Dataset, *, num_rows: int, max_length: int) -> PreparedData:
    supervised = [sum(label >= 0 for label in labels[1:]) for labels in encoded["labels"]]
    kept = encoded.select([row for row, count in enumerate(supervised) if count], keep_in_memory=True)
    if len(kept) == 0:
        raise DataError(
            f"no row of {name} has a token to train: {num_rows} rows, all of them only prompt "
            f"within the first {max_length} tokens",
            hint="Raise --max-length, or check that the rows hold answers.",
        )
    lengths = [len(ids) for ids in kept["input_ids"]]
    report = DataReport(
        name=name,
        format=fmt,
        num_rows=len(kept),
        num_tokens=sum(lengths),
        num_supervised_tokens=sum(supervised),
        longest_row_tokens=max(lengths),
        num_truncated_rows=sum(encoded["cut"]),
        num_dropped_rows=num_rows - len(kept),
        num_lost_supervised_tokens=sum(encoded["lost"]),
        fingerprint=_fingerprint(kept),
    )
    return PreparedData(dataset=kept.select_columns(["input_ids", "labels"]), report=report)


def _fingerprint(rows: Dataset) -> str:
    """Return a SHA-256 of every token and label, in order."""
    digest = hashlib.sha256()
    for batch in rows.with_format("numpy").iter(batch_size=1000):
        for input_ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            digest.update(len(input_ids).to_bytes(8, "little"))
            digest.update(input_ids.astype("int32").tobytes())
            digest.update(labels.astype("int32").tobytes())
    return digest.hexdigest()
