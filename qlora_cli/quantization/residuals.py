"""Low-rank approximations of quantization residuals, computed while weights are read (for LoftQ)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class LowRankFactors:
    """A matrix as the product of `left`, `(out, rank)`, and `right`, `(rank, in)`, both in fp32."""

    left: torch.Tensor
    right: torch.Tensor


@dataclass
class QuantizationResiduals:
    """The residuals of some weights, `factors`, each at the rank that `ranks` requests, by full name.

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
