"""The loss of pairs: values by hand, and what no pair may change."""

import math

import pytest
import torch

from qlora_cli.loss.preference_loss import dpo_losses, log_probs_of_sequences


def test_log_probabilities_are_added_sequence_by_sequence() -> None:
    nll = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    assert log_probs_of_sequences(nll, [2, 1, 2]).tolist() == [-3.0, -4.0, -24.0]


def test_losses_and_rewards_are_those_of_the_paper() -> None:
    policy = torch.tensor([-10.0, -20.0, -30.0, -12.0], requires_grad=True)
    reference = torch.tensor([-11.0, -19.0, -30.0, -10.0])
    pairs = dpo_losses(policy, reference, 0.5)
    assert pairs.chosen_rewards.tolist() == [0.5, 0.0]
    assert pairs.rejected_rewards.tolist() == [-0.5, -1.0]
    assert pairs.losses.tolist() == pytest.approx([math.log(1 + math.exp(-1.0))] * 2)
    (gradient,) = torch.autograd.grad(pairs.losses.sum(), [policy])
    pull = 0.5 / (1 + math.exp(1.0))
    assert gradient.tolist() == pytest.approx([-pull, pull, -pull, pull])


def test_the_base_itself_loses_the_logarithm_of_two() -> None:
    log_probs = torch.tensor([-3.0, -9.0])
    assert dpo_losses(log_probs, log_probs, 0.1).losses.item() == pytest.approx(math.log(2))
