"""The collator that makes batches for training, evaluation and preview."""

from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


def make_collator(pad_token_id: int | None, *, packing: bool) -> DataCollatorForLanguageModeling:
    """Return TRL's collator, which masks padding by position, so that a pad token that is also EOS hides no real EOS.

    With `packing` it does not pad: the rows of a batch are concatenated to `(1, seq)`, with positions that restart at
    0 in each of them, which separates them in attention.
    """
    assert pad_token_id is not None, "chosen on loading"
    return DataCollatorForLanguageModeling(pad_token_id=pad_token_id, padding_free=packing)
