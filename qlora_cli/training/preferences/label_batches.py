"""The batches of answers with labels, and those of answers to prompts that are not theirs, for the baseline of KTO."""

from qlora_cli.data.feeding.mismatched import mismatched_rows
from qlora_cli.training.batches import NUM_TRAINED, Batch, BatchCollator, Row, num_trained
from qlora_cli.training.preferences.pair_batches import NUM_TRAINED_OF

DESIRABLE = "desirable"


class LabelCollator(BatchCollator):
    """Makes a micro-batch of answers with labels; `desirable` says which are wanted.

    `NUM_TRAINED_OF` are the trained tokens of each, and `NUM_TRAINED` is their number, over which the loss is a mean.
    """

    def __init__(
        self, pad_token_id: int | None, *, packing: bool, keeps_copies: bool = False, longest_tokens: int
    ) -> None:
        """Cut what is not a row to `longest_tokens`, those of the longest row, so that it needs no more memory."""
        super().__init__(pad_token_id, packing=packing, keeps_copies=keeps_copies)
        self._longest_tokens = longest_tokens

    def __call__(self, rows: list[Row]) -> Batch:
        """Return the micro-batch."""
        batch = super().__call__([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
        return {
            **batch,
            NUM_TRAINED_OF: [num_trained(row) for row in rows],
            NUM_TRAINED: self.num_items(rows),
            DESIRABLE: [bool(row[DESIRABLE]) for row in rows],
        }

    def num_items(self, rows: list[Row]) -> int:
        """Return the number of answers."""
        return len(rows)

    def blank(self, row: Row) -> Row:
        """Return a short row without a trained token, whose log-probability is 0."""
        return {**super().blank(row), DESIRABLE: True}

    def mismatched(self, rows: list[Row]) -> list[Row]:
        """Return the prompt of each row with the answer of the one before it, of the first with that of the last."""
        return [
            {**sequence, DESIRABLE: row[DESIRABLE]}
            for row, sequence in zip(rows, mismatched_rows(rows, self._longest_tokens), strict=True)
        ]
