"""Compute a mean with its standard error from the losses of rows, and a difference that is paired by row.

Rows are sampled, not tokens: the mean over tokens is a ratio of two sums over rows, and its standard error
that of a ratio estimator (Cochran, Sampling Techniques, 3rd edition, section 2.11).
"""

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qlora_cli.evaluating.evaluation_result import Kind, SourceResult

if TYPE_CHECKING:
    from qlora_cli.evaluating.losses import RowLosses  # with torch

Values = NDArray[np.float64]


def ratio_stderr(values: Values, sizes: NDArray[np.int64]) -> float | None:
    """Return the standard error of `values.sum() / sizes.sum()` over rows, both `(rows,)`; None for a single row."""
    num_rows = len(values)
    if num_rows < 2:
        return None
    residuals = values - values.sum() / sizes.sum() * sizes
    return math.sqrt(num_rows / (num_rows - 1) * float((residuals**2).sum())) / int(sizes.sum())


def summarize(source: Kind, path: str, quantization: str, rows: "RowLosses", base: "RowLosses | None") -> SourceResult:
    """Return the figures of one model, and its difference from `base` on the same rows, if that was measured."""
    num_tokens = int(rows.tokens.sum())
    difference = stderr = None
    if base is not None:
        assert (base.tokens == rows.tokens).all(), "the same rows"
        difference = rows.loss - base.loss
        stderr = ratio_stderr(rows.nll - base.nll, rows.tokens)
    return SourceResult(
        source=source,
        path=path,
        quantization=quantization,
        loss=finite(rows.loss),
        loss_stderr=finite(ratio_stderr(rows.nll, rows.tokens)),
        perplexity=perplexity_of(rows.loss),
        token_accuracy=int(rows.correct.sum()) / num_tokens,
        num_rows=len(rows.nll),
        num_tokens=num_tokens,
        seconds=rows.seconds,
        tokens_per_second=rows.num_fed / rows.seconds,
        difference=finite(difference),
        difference_stderr=finite(stderr),
    )


def perplexity_of(loss: float) -> float | None:
    """Return exp(loss); None if it is not finite."""
    try:
        return finite(math.exp(loss))
    except OverflowError:
        return None


def finite(value: float | None) -> float | None:
    """Return `value` if it is finite, as JSON requires; otherwise None."""
    return value if value is not None and math.isfinite(value) else None
