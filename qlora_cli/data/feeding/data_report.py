"""What became of a data set's rows, as plain numbers. Imports no torch."""

from dataclasses import dataclass

from qlora_cli.units import counted

NEARLY_EQUAL = "that a trained row equals but for case, punctuation and spaces"


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What one data set contributes to the rows that are fed.

    Attributes:
        name: The data set, as it was named.
        rows: Its rows that are fed, each counted as often as it is.
        share: Of all rows that are fed.
        supervised_tokens: Its tokens that are trained.
    """

    name: str
    rows: int
    share: float
    supervised_tokens: int


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What became of the rows of a data set, or of several that are mixed.

    Attributes:
        name: The data sets, as they were named.
        format: The format of each of them.
        recognised: The same, with the columns that are not called as ours.
        rows: Rows that could be read.
        rows_trained: Rows that are fed, each counted as often as it is.
        tokens: Tokens that are fed.
        supervised_tokens: Of them, those that are trained.
        longest_row_tokens: Tokens of the longest row that is fed.
        truncated_rows: Rows that were cut at the longest length.
        dropped_rows: Rows that were dropped for being too long.
        tokens_lost: Tokens that were cut off or dropped with rows that are too long.
        supervised_tokens_lost: Of them, those that would have been trained.
        rows_without_supervision: Rows without a token to train, which are not fed.
        duplicate_rows: Rows that repeat an earlier one.
        duplicates_dropped: Of them, those that are not fed.
        held_out_rows: Rows that are not trained because they are held out.
        near_duplicate_rows: Of rows that are held out, those that a trained one equals but for case, punctuation and
            spaces; None of rows that are trained.
        groups: Groups that the rows that are fed belong to; None if they are not held out by groups.
        bad_rows: Rows that can't be used, and were skipped.
        empty_answers: Of them, those that only lack an answer.
        mixture: What each data set contributes, in the order that they were named.
        packed_rows: Rows that the rows that are fed were packed into; None if they are not packed.
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
    groups: int | None
    bad_rows: int
    empty_answers: int
    mixture: tuple[Contribution, ...]
    packed_rows: int | None
    fingerprint: str


def describe_mixture(report: DataReport) -> str:
    """Return in words what each data set contributes: its rows, and its shares of all rows and of what is trained."""
    parts = []
    for part in report.mixture:
        trained = part.supervised_tokens / max(1, report.supervised_tokens)
        parts.append(f"{part.name}: {counted(part.rows, 'row')} ({part.share:.1%}, {trained:.1%} of what is trained)")
    return "; ".join(parts)
