"""Pair the losses of two runs by row, and judge the difference by its standard error."""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlora_cli.evaluating.comparison_result import NUM_STDERRS, Verdict
from qlora_cli.evaluating.statistics import ratio_stderr

Digests = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class LossesOfRows:
    """The losses of one model by row, sorted by the rows' digests so that those of several models are paired.

    Arrays are `(rows,)`: `nll` is the sum over a row's trained tokens, in nats, `tokens` their number.
    """

    digests: Digests
    nll: NDArray[np.float64]
    tokens: NDArray[np.int64]

    @classmethod
    def in_order(cls, digests: Digests, nll: NDArray[np.float64], tokens: NDArray[np.int64]) -> "LossesOfRows":
        """Return the losses sorted by digest; equal rows have equal losses, so their order does not matter."""
        order = np.argsort(digests, kind="stable")
        return cls(digests=digests[order], nll=nll[order], tokens=tokens[order])

    @property
    def loss(self) -> float:
        """The mean over all trained tokens."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def stderr(self) -> float | None:
        """The standard error of the loss, over rows; None for a single row."""
        return ratio_stderr(self.nll, self.tokens)

    def has_rows_of(self, other: "LossesOfRows") -> bool:
        """Return whether the rows are the same, by content."""
        return np.array_equal(self.digests, other.digests) and np.array_equal(self.tokens, other.tokens)

    def num_shared(self, other: "LossesOfRows") -> int:
        """Return the number of rows that both have."""
        return (Counter(self.digests.tolist()) & Counter(other.digests.tolist())).total()

    def stderr_of_difference(self, reference: "LossesOfRows") -> float | None:
        """Return the standard error of the loss minus that of `reference`, paired by row; None for a single row."""
        assert self.has_rows_of(reference)
        return ratio_stderr(self.nll - reference.nll, self.tokens)


def judge(run: LossesOfRows, reference: LossesOfRows, margin: float) -> Verdict:
    """Return whether the loss of `run` is worse than that of `reference` by more than `margin`, in nats.

    `worse` and `not_worse` are beyond chance, by two standard errors of the difference; a single row decides nothing.
    A loss that is not finite is worse than one that is.
    """
    if not (math.isfinite(run.loss) and math.isfinite(reference.loss)):
        return "worse" if math.isfinite(reference.loss) else "not_worse"
    stderr, excess = run.stderr_of_difference(reference), run.loss - reference.loss - margin
    if stderr is None:
        return "unclear"
    if excess > NUM_STDERRS * stderr:
        return "worse"
    return "not_worse" if excess <= -NUM_STDERRS * stderr else "unclear"
