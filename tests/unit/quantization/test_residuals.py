"""Weighted approximations of a residual are the best for what a layer computes, and plain ones for its weight."""

import pytest
import torch

from qlora_cli.quantization.calibrated_blocks import InputMoments
from qlora_cli.quantization.residuals import LowRankFactors, low_rank_approximation, weighted_approximation


def inputs(num_tokens: int, width: int) -> torch.Tensor:
    """Return correlated inputs, `(tokens, width)`, some of whose features are far larger than others."""
    torch.manual_seed(0)
    return torch.randn(num_tokens, width) @ torch.randn(width, width) * torch.logspace(-1, 1, width)


def moments_of(values: torch.Tensor) -> InputMoments:
    return InputMoments(matrix=values.T @ values, num_tokens=len(values))


def error(residual: torch.Tensor, factors: LowRankFactors, values: torch.Tensor) -> float:
    return float(((residual - factors.left @ factors.right) @ values.T).norm())


@pytest.mark.parametrize("shape", [(24, 48), (48, 24), (32, 32)])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_its_outputs_are_nearer_and_as_near_as_they_can_be(shape: tuple[int, int], rank: int) -> None:
    residual, values = torch.randn(shape, generator=torch.Generator().manual_seed(1)), inputs(500, shape[1])
    factors = weighted_approximation(residual, moments_of(values), rank)
    assert (factors.left.shape, factors.right.shape) == ((shape[0], rank), (rank, shape[1]))
    damped = torch.cat([values, (0.01 * values.square().sum(0).mean()).sqrt() * torch.eye(shape[1])])
    best = torch.linalg.svdvals(residual @ damped.T)[rank:].norm()
    assert error(residual, factors, damped) == pytest.approx(float(best), rel=1e-3)
    assert error(residual, factors, values) < 0.95 * error(residual, low_rank_approximation(residual, rank), values)
    torch.testing.assert_close(factors.left.norm(dim=0), factors.right.norm(dim=1))


@pytest.mark.parametrize("num_tokens", [0, 1, 10])
def test_few_tokens_count_by_the_size_of_their_features_alone(num_tokens: int) -> None:
    residual, values = torch.randn(24, 48, generator=torch.Generator().manual_seed(1)), inputs(num_tokens, 48)
    factors = weighted_approximation(residual, moments_of(values), 8)
    assert factors.left.isfinite().all()
    assert factors.right.isfinite().all()
    scaled = residual * (values.square().sum(0) + 0.01 * values.square().sum(0).mean()).sqrt()
    if num_tokens:
        best = float(torch.linalg.svdvals(scaled)[8:].norm())
        left_out = (residual - factors.left @ factors.right) * scaled / residual
        assert float(left_out.norm()) == pytest.approx(best, rel=1e-3)


def test_a_rank_beyond_that_of_the_residual_restores_it() -> None:
    residual = torch.randn(24, 48, generator=torch.Generator().manual_seed(1))
    factors = weighted_approximation(residual, moments_of(inputs(500, 48)), 64)
    torch.testing.assert_close(factors.left @ factors.right, residual, rtol=1e-3, atol=1e-3)
