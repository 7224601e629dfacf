"""Batches as training feeds them: the one collator, used by training, evaluation and preview."""

from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


def make_collator(pad_token_id: int | None, *, packing: bool) -> DataCollatorForLanguageModeling:
    """Return TRL's collator, which pads by position, so that a pad token that is an end token hides no real end.

    With `packing` it pads nothing: the rows of a batch come one after the other, as `(1, seq)`, with positions that
    begin at 0 in each of them, from which attention tells them apart.
    """
    assert pad_token_id is not None, "chosen on loading"
    return DataCollatorForLanguageModeling(pad_token_id=pad_token_id, padding_free=packing)
