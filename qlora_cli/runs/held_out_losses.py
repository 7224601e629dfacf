"""The loss of each held-out row by the final weights of a run, kept in its directory by `qlora compare`.

They count only for the weights and the rows that they were measured with: a file that does not match is measured anew.
"""

import json
import math

from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator

from qlora_cli.files import read_small
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.units import Whole
from qlora_cli.writing import write_file


class KeptAnswers(BaseModel):
    """The losses of answers that are compared, in the order of the data, in nats; see `AnswerLosses`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    nll: tuple[float, ...]
    tokens: tuple[Whole, ...]
    reference_nll: tuple[float, ...] | None
    is_desirable: tuple[bool, ...] | None
    gain: tuple[float, ...] | None
    rows_per_baseline: PositiveInt | None

    @model_validator(mode="after")
    def _one_for_each_answer(self) -> "KeptAnswers":
        lists = [self.nll, self.tokens, *(one for one in (self.reference_nll, self.is_desirable, self.gain) if one)]
        if len(set(map(len, lists))) != 1 or not all(self.tokens):
            raise ValueError("must have a loss and trained tokens of each answer")
        has_labels = self.is_desirable is not None
        if has_labels != (self.rows_per_baseline is not None):
            raise ValueError("must say which answers have one baseline if they have labels")
        if (self.gain is not None) != (has_labels and self.reference_nll is not None):
            raise ValueError("must have what baselines are made of if answers have labels")
        return self

    @property
    def is_finite(self) -> bool:
        """Whether all losses are."""
        return all(map(math.isfinite, (*self.nll, *(self.reference_nll or ()), *(self.gain or ()))))

    @property
    def answers_per_row(self) -> int:
        """The answers of a row: two of a pair."""
        return 2 if self.is_desirable is None else 1


class HeldOutLosses(BaseModel):
    """The losses of rows, in the order of the data.

    Attributes:
        fingerprint: That of the rows, as in the run's record.
        weights: SHA-256 of the adapter's weights.
        device, compute_dtype, quantization: How they were measured.
        row_digests: A digest of each row's tokens and labels.
        row_nll: The summed negative log-likelihood of each row's trained tokens, in nats.
        row_tokens: The number of each row's trained tokens.
        answers: Those of answers that are compared; the rows have the chosen ones then. None of other rows.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    fingerprint: str
    weights: str
    device: str
    compute_dtype: str
    quantization: str
    row_digests: tuple[int, ...]
    row_nll: tuple[float, ...]
    row_tokens: tuple[Whole, ...]
    answers: KeptAnswers | None = None

    @model_validator(mode="after")
    def _one_for_each_row(self) -> "HeldOutLosses":
        if not len(self.row_digests) == len(self.row_nll) == len(self.row_tokens) > 0:
            raise ValueError("must have a digest, a loss and a number of tokens for each row")
        if not all(-(1 << 63) <= digest < 1 << 63 for digest in self.row_digests) or sum(self.row_tokens) == 0:
            raise ValueError("must have digests of 64 bits, and trained tokens")
        if self.answers is not None and len(self.answers.nll) != self.answers.answers_per_row * len(self.row_digests):
            raise ValueError("must have the answers of each row")
        return self

    @property
    def is_finite(self) -> bool:
        """Whether all losses are; others are not worth keeping."""
        return all(map(math.isfinite, self.row_nll)) and (self.answers is None or self.answers.is_finite)


def read_losses(run: RunDirectory, *, fingerprint: str | None, weights: str) -> HeldOutLosses | None:
    """Return the kept losses of the rows of a `fingerprint` by `weights`, a digest; None if there are none of both."""
    try:
        kept = HeldOutLosses.model_validate_json(read_small(run.losses_file))
    except (OSError, ValueError, RecursionError):
        return None
    is_of_both = (kept.fingerprint, kept.weights) == (fingerprint, weights)
    return kept if is_of_both and kept.is_finite else None


def write_losses(run: RunDirectory, losses: HeldOutLosses) -> None:
    """Keep the losses in the directory of the run.

    Raises:
        OSError: it can't be written.
    """
    write_file(run.losses_file, json.dumps(losses.model_dump(mode="json")) + "\n")
