"""The batches of pairs: both sequences of a pair are always in one micro-batch."""

from qlora_cli.data.feeding.collate import sequences_of
from qlora_cli.data.rows.examples import IGNORE_INDEX
from qlora_cli.training.batches import BLANK_TOKENS, NUM_TRAINED, Batch, BatchCollator, Row, num_trained

NUM_TRAINED_OF = "num_trained_of"


class PairCollator(BatchCollator):
    """Makes a micro-batch of pairs: a batch of their sequences, chosen and rejected in turn.

    `num_trained_of` are the trained tokens of each sequence, and `NUM_TRAINED` is the number of pairs, over which the
    loss is a mean.
    """

    def __call__(self, rows: list[Row]) -> Batch:
        """Return the micro-batch."""
        sequences = [sequence for row in rows for sequence in sequences_of(row)]
        batch = super().__call__(sequences)
        return {**batch, NUM_TRAINED_OF: [num_trained(one) for one in sequences], NUM_TRAINED: self.num_items(rows)}

    def num_items(self, rows: list[Row]) -> int:
        """Return the number of pairs."""
        return len(rows)

    def blank(self, row: Row) -> Row:
        """Return a pair of the same two tokens, one of them trained: of none, a loss would not be finite."""
        ids = list(row["input_ids"])[:BLANK_TOKENS]
        return {"input_ids": [*ids, *ids], "labels": [IGNORE_INDEX, *ids[1:]] * 2, "first": len(ids)}
