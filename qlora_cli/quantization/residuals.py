"""Low-rank approximations of quantization residuals, by which adapters are initialized.

Those for LoftQ are the best for the weights, and computed while these are read. Weighted ones are the best for what
the layers compute, by the moments of their inputs (as QERA, arXiv 2410.06040, and CLoQ, arXiv 2501.18475).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from qlora_cli.quantization.calibrated_blocks import InputMoments


@dataclass(frozen=True, kw_only=True)
class LowRankFactors:
    """A matrix as the product of `left`, `(out, rank)`, and `right`, `(rank, in)`, both in fp32."""

    left: torch.Tensor
    right: torch.Tensor

    def to(self, device: torch.device) -> "LowRankFactors":
        """Return the same factors on `device`."""
        return LowRankFactors(left=self.left.to(device), right=self.right.to(device))


@dataclass
class QuantizationResiduals:
    """The residuals of some weights, `factors`, each at the rank that `ranks` says, by full name.

    Copying returns the same object: transformers copies the config that holds it.
    """

    ranks: Mapping[str, int]
    factors: dict[str, LowRankFactors] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, object]) -> "QuantizationResiduals":
        return self

    def add(self, name: str, residual: torch.Tensor) -> None:
        """Record the residual of the weight `name`, `(out, in)` in fp32, at its rank."""
        self.factors[name] = low_rank_approximation(residual, self.ranks[name])


def low_rank_approximation(matrix: torch.Tensor, rank: int) -> LowRankFactors:
    """Return the best approximation of `matrix` at `rank`, or at its own rank if lower, in factors of equal norms.

    By Eckart and Young it is the projection on the leading singular vectors. These are the eigenvectors of the Gram
    matrix of the shorter side, which takes much less time than a singular value decomposition.
    """
    num_rows, num_columns = matrix.shape
    if num_rows > num_columns:
        transposed = low_rank_approximation(matrix.T, rank)
        return LowRankFactors(left=transposed.right.T.contiguous(), right=transposed.left.T.contiguous())
    _, vectors = torch.linalg.eigh(matrix @ matrix.T)  # in ascending order
    leading = vectors.flip(1)[:, :rank]
    projected = leading.T @ matrix
    roots = projected.norm(dim=1).sqrt()  # of the singular values
    return LowRankFactors(
        left=leading * roots, right=projected / roots.clamp_min(torch.finfo(roots.dtype).tiny)[:, None]
    )


def weighted_approximation(residual: torch.Tensor, moments: InputMoments, rank: int) -> LowRankFactors:
    """Return the approximation of `residual`, `(out, in)`, whose product with the inputs is nearest to its own.

    With the moments of the inputs X as L Lᵀ, the error of the outputs, |(residual - approximation) X|, is that of the
    matrices times L. Each column of the left factor has the norm of its row in the right one.
    """
    root = moments.root()
    factors = low_rank_approximation(residual @ root, rank)
    right = torch.linalg.solve_triangular(root, factors.right, upper=False, left=False)
    tiny = torch.finfo(right.dtype).tiny
    balance = (right.norm(dim=1) / factors.left.norm(dim=0).clamp_min(tiny)).clamp_min(tiny).sqrt()
    return LowRankFactors(left=factors.left * balance, right=right / balance[:, None])
