"""The loss of each held-out row by the final weights of a run, kept in its directory by `qlora compare`.

They count only for the weights and the rows that they were measured with: a file that does not match is measured anew.
"""

import json
import math

from pydantic import BaseModel, ConfigDict, model_validator

from qlora_cli.files import read_small
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.units import Whole
from qlora_cli.writing import write_file


class HeldOutLosses(BaseModel):
    """The losses of rows, in the order of the data.

    Attributes:
        fingerprint: That of the rows, as in the run's record.
        weights: SHA-256 of the adapter's weights.
        device, compute_dtype, quantization: How they were measured.
        row_digests: A digest of each row's tokens and labels.
        row_nll: The summed negative log-likelihood of each row's trained tokens, in nats.
        row_tokens: The number of each row's trained tokens.
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

    @model_validator(mode="after")
    def _one_for_each_row(self) -> "HeldOutLosses":
        if not len(self.row_digests) == len(self.row_nll) == len(self.row_tokens) > 0:
            raise ValueError("must have a digest, a loss and a number of tokens for each row")
        if not all(-(1 << 63) <= digest < 1 << 63 for digest in self.row_digests) or sum(self.row_tokens) == 0:
            raise ValueError("must have digests of 64 bits, and trained tokens")
        return self


def read_losses(run: RunDirectory, *, fingerprint: str | None, weights: str) -> HeldOutLosses | None:
    """Return the kept losses of the rows of a `fingerprint` by `weights`, a digest; None if there are none of both."""
    try:
        kept = HeldOutLosses.model_validate_json(read_small(run.losses_file))
    except (OSError, ValueError, RecursionError):
        return None
    is_of_both = (kept.fingerprint, kept.weights) == (fingerprint, weights)
    return kept if is_of_both and all(map(math.isfinite, kept.row_nll)) else None


def write_losses(run: RunDirectory, losses: HeldOutLosses) -> None:
    """Keep the losses in the directory of the run.

    Raises:
        OSError: it can't be written.
    """
    write_file(run.losses_file, json.dumps(losses.model_dump(mode="json")) + "\n")
