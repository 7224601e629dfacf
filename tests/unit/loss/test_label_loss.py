"""The losses of answers with labels: values and gradients by hand, and a baseline without a gradient."""

import math

import pytest
import torch

from qlora_cli.loss.label_loss import LabelLoss, baseline_of
from qlora_cli.settings.objectives import COMPARED_BY, Objective

LOSS = LabelLoss(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)


def test_one_objective_has_labels() -> None:
    assert [name for name in COMPARED_BY if name.has_labels] == [Objective.KTO]


def test_losses_and_gradients_are_those_of_the_paper() -> None:
    policy = torch.tensor([-10.0, -10.0], requires_grad=True)
    losses = LOSS.losses(policy, torch.tensor([-13.0, -13.0]), [True, False], torch.tensor(1.0))
    value = 1 / (1 + math.exp(-0.5 * (3.0 - 1.0)))  # equation 7: of a gain of 3 nats and a baseline of 1
    assert losses.tolist() == pytest.approx([2.0 * (1 - value), 3.0 * value])
    (gradient,) = torch.autograd.grad(losses.sum(), [policy])
    slope = 0.5 * value * (1 - value)
    assert gradient.tolist() == pytest.approx([-2.0 * slope, 3.0 * slope])


def test_the_baseline_is_a_mean_that_is_never_negative() -> None:
    assert baseline_of(torch.tensor([3.0, 1.0]).sum(), 2).item() == 2.0
    assert baseline_of(torch.tensor([0.0, -8.0]).sum(), 2).item() == 0.0
