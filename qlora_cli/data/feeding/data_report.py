"""The report on what became of a data set's rows, as plain numbers. Imports no torch."""

from dataclasses import dataclass

from qlora_cli.units import counted

NEARLY_EQUAL = "that equal a trained row except for case, punctuation and spaces"


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """The contribution of one data set to the rows that are fed.

    Attributes:
        name: The name of the data set, as the user gave it.
        rows: Its rows that are fed, counting repetitions.
        share: Its share of all rows that are fed.
        supervised_tokens: Its trained tokens.
    """

    name: str
    rows: int
    share: float
    supervised_tokens: int


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Counts of what became of the rows of a data set, or of several that are mixed.

    Attributes:
        name: The names of the data sets, as the user gave them.
        format: The format of each of them.
        recognised: The same, with the columns whose names differ from ours.
        rows: Rows that could be read.
        rows_trained: Rows that are fed, counting repetitions.
        tokens: Tokens that are fed.
        supervised_tokens: Trained tokens among them.
        longest_row_tokens: Tokens of the longest row that is fed.
        truncated_rows: Rows that were truncated to the maximum length.
        dropped_rows: Rows that were dropped for being too long.
        tokens_lost: Tokens that were lost by truncating and dropping long rows.
        supervised_tokens_lost: Tokens among them that would have been trained.
        rows_without_supervision: Rows without a token to train, which are not fed.
        duplicate_rows: Rows that repeat an earlier one.
        duplicates_dropped: Rows among them that are not fed.
        held_out_rows: Rows that are held out of training.
        near_duplicate_rows: In the report on held-out rows, those that equal a trained one except for case,
            punctuation and spaces; None in the report on trained rows.
        desirable_rows: Rows that are fed whose label says that their answer is wanted; None if rows have no labels.
        groups: The number of groups of the rows that are fed; None if rows are not held out by group.
        bad_rows: Rows that can't be used, and were skipped.
        empty_answers: Rows among them that only lack an answer.
        mixture: The contribution of each data set, in the order of their names.
        packed_rows: The number of packed rows; None if rows are not packed.
        fingerprint: A SHA-256 over the tokens and labels of all rows that are fed, in order.
    """

    name: str
    format: str
    recognised: str
    rows: int
    rows_trained: int
    tokens: int
    supervised_tokens: int
    longest_row_tokens: int
    truncated_rows: int
    dropped_rows: int
    tokens_lost: int
    supervised_tokens_lost: int
    rows_without_supervision: int
    duplicate_rows: int
    duplicates_dropped: int
    held_out_rows: int
    near_duplicate_rows: int | None
    desirable_rows: int | None
    groups: int | None
    bad_rows: int
    empty_answers: int
    mixture: tuple[Contribution, ...]
    packed_rows: int | None
    fingerprint: str

    @property
    def undesirable_rows(self) -> int:
        """Rows that are fed whose label says that their answer is not wanted; rows have labels."""
        assert self.desirable_rows is not None
        return self.rows_trained - self.desirable_rows


def describe_mixture(report: DataReport) -> str:
    """Return the contribution of each data set in words: its rows, and its shares of all rows and trained tokens."""
    parts = []
    for part in report.mixture:
        trained = part.supervised_tokens / max(1, report.supervised_tokens)
        parts.append(
            f"{part.name}: {counted(part.rows, 'row')} ({part.share:.1%}, {trained:.1%} of the trained tokens)"
        )
    return "; ".join(parts)
