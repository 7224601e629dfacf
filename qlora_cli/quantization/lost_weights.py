"""What quantization lost of a weight, taken down at a low rank while the weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class ResidualFactors:
    """A matrix as the product of `left`, `(out, rank)`, and `right`, `(rank, in)`, both in fp32."""

    left: torch.Tensor
    right: torch.Tensor


@dataclass
class Losses:
    """What was lost of some weights: the rank that each is wanted at, and the `parts` that were taken down.

    Both by full name. Copies are the same object: transformers copies a config that it is given.
    """

    ranks: Mapping[str, int]
    parts: dict[str, ResidualFactors] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, object]) -> "Losses":
        return self

    def take(self, name: str, lost: torch.Tensor) -> None:
        """Take down what was lost of the weight `name`, `(out, in)` in fp32, whose rank is known."""
        self.parts[name] = best_of_rank(lost, self.ranks[name])


def best_of_rank(matrix: torch.Tensor, rank: int) -> ResidualFactors:
    """Return the nearest matrix of `rank`, or of the rank that `matrix` has at most, in two factors of equal norms.

    By Eckart and Young it is the projection on the leading singular vectors. These are the eigenvectors of the Gram
    matrix of the shorter side, which are found many times faster than a decomposition of a long matrix.
    """
    num_rows, num_columns = matrix.shape
    if num_rows > num_columns:
        found = best_of_rank(matrix.T, rank)
        return ResidualFactors(left=found.right.T.contiguous(), right=found.left.T.contiguous())
    _, vectors = torch.linalg.eigh(matrix @ matrix.T)  # in ascending order
    leading = vectors.flip(1)[:, :rank]
    projected = leading.T @ matrix
    roots = projected.norm(dim=1).sqrt()  # of the singular values
    return ResidualFactors(
        left=leading * roots, right=projected / roots.clamp_min(torch.finfo(roots.dtype).tiny)[:, None]
    )
