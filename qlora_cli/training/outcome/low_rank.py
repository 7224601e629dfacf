"""The update of a module, scale · B A, measured by its factors alone: the matrix itself never exists as a whole.

With B = Q R and A^T = P S, orthogonal Q and P, the singular values of B A are those of the small matrix R S^T.
"""

from dataclasses import dataclass

import torch

MOST_ROWS = 64  # of a weight, evenly spaced, that rounding is measured on


@dataclass(frozen=True, kw_only=True)
class UpdateFactors:
    """The factors of scale · left @ right: `left` is (out, rank), `right` (rank, in), both in fp32."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        """The number of columns of `left`."""
        return self.right.shape[0]

    def singular_values(self) -> torch.Tensor:
        """Return the singular values of the update, at most `rank`, in fp64 on the CPU, largest first."""
        cores = [torch.linalg.qr(factor, mode="r").R.double().cpu() for factor in (self.left, self.right.T)]
        values: torch.Tensor = torch.linalg.svdvals(cores[0] @ cores[1].T)
        return values * abs(self.scale)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Return some rows of the update, `(indices, in)`."""
        return self.left[indices] @ self.right * self.scale


def effective_rank(values: torch.Tensor) -> float:
    """Return exp of the entropy of singular `values`, divided by their sum (Roy and Vetterli 2007); 0 if all are 0."""
    total = values.sum()
    if not total > 0:
        return 0.0
    return float(torch.exp(torch.special.entr(values / total).sum()))


def lost_share(factors: UpdateFactors, weight: torch.Tensor, dtype: torch.dtype) -> float:
    """Return the norm of what a merge into `dtype` rounds off the update, as a share of the update's norm.

    Measured on rows of `weight` (out, in), which is rounded to `dtype` first: what it loses is not the update's loss.
    """
    num_rows = weight.shape[0]
    indices = torch.linspace(0, num_rows - 1, min(MOST_ROWS, num_rows), device=weight.device).round().long()
    base, update = weight[indices].to(dtype).float(), factors.rows(indices)
    kept = (base + update).to(dtype).float() - base
    norm = float(update.norm())
    return float((kept - update).norm()) / norm if norm else 0.0
