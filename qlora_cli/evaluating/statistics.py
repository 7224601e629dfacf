"""Compute a mean with its standard error from the losses of rows, and a difference that is paired by row.

Rows are sampled, not tokens: the mean over tokens is a ratio of two sums over rows, and its standard error
that of a ratio estimator (Cochran, Sampling Techniques, 3rd edition, section 2.11).
"""

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qlora_cli.evaluating.answer_losses import AnswerFigures
from qlora_cli.evaluating.evaluation_result import Kind, PreferenceResult, SourceResult

if TYPE_CHECKING:
    from qlora_cli.evaluating.losses import RowLosses  # with torch

Values = NDArray[np.float64]


def ratio_stderr(values: Values, sizes: NDArray[np.int64]) -> float | None:
    """Return the standard error of `values.sum() / sizes.sum()` over rows, both `(rows,)`; None for a single row.

    Rows of size 0 do not count.
    """
    num_rows = int((sizes > 0).sum())
    if num_rows < 2:
        return None
    residuals = values - values.sum() / sizes.sum() * sizes
    return math.sqrt(num_rows / (num_rows - 1) * float((residuals**2).sum())) / int(sizes.sum())


def mean_stderr(values: Values) -> float | None:
    """Return the standard error of the mean of `values`, `(rows,)`; None for a single row."""
    return ratio_stderr(values, np.ones(len(values), np.int64))


def summarize(
    source: Kind,
    path: str,
    quantization: str,
    rows: "RowLosses",
    base: "RowLosses | None",
    preference: PreferenceResult | None = None,
) -> SourceResult:
    """Return the figures of one model, and its difference from `base` on the same rows, if that was measured.

    `preference` is what it makes of answers that are compared.
    """
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
        preference=preference,
    )


def summarize_preference(figures: AnswerFigures) -> PreferenceResult:
    """Return the figures of answers as means over rows, with their standard errors."""
    chosen, rejected = figures.rewards[figures.is_chosen], figures.rewards[~figures.is_chosen]
    stderrs = [mean_stderr(chosen), mean_stderr(rejected)]
    is_right, losses = figures.is_right.astype(np.float64), figures.losses
    if figures.baseline is None:  # the rewards of a pair are not independent
        margin_stderr = mean_stderr(chosen - rejected)
    else:
        margin_stderr = None if None in stderrs else math.hypot(*filter(None, stderrs))
    return PreferenceResult(
        loss=None if losses is None else finite(float(losses.mean())),
        loss_stderr=None if losses is None else finite(mean_stderr(losses)),
        accuracy=float(is_right.mean()),
        accuracy_stderr=mean_stderr(is_right),
        margin=finite(float(chosen.mean() - rejected.mean())),
        margin_stderr=finite(margin_stderr),
        chosen_reward=finite(float(chosen.mean())),
        chosen_reward_stderr=finite(stderrs[0]),
        rejected_reward=finite(float(rejected.mean())),
        rejected_reward_stderr=finite(stderrs[1]),
        kl=None if figures.baseline is None else finite(float(figures.baseline.mean())),
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
