"""The collator that makes batches for training, evaluation and preview."""

from collections.abc import Mapping
from typing import Any

from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


def make_collator(pad_token_id: int | None, *, packing: bool) -> DataCollatorForLanguageModeling:
    """Return TRL's collator, which masks padding by position, so that a pad token that is also EOS hides no real EOS.

    With `packing` it does not pad: the rows of a batch are concatenated to `(1, seq)`, with positions that restart at
    0 in each of them, which separates them in attention.
    """
    assert pad_token_id is not None, "chosen on loading"
    return DataCollatorForLanguageModeling(pad_token_id=pad_token_id, padding_free=packing)


def sequences_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the sequences of a row as rows of their own: one, or the two of a pair."""
    ids, labels, first = row["input_ids"], row["labels"], row.get("first", 0)
    starts = (0, first) if first else (0,)
    ends = (first, len(ids)) if first else (len(ids),)
    return [
        {"input_ids": ids[start:end], "labels": labels[start:end]} for start, end in zip(starts, ends, strict=True)
    ]
