"""The losses of pairs: values by hand and by TRL, and what no pair may change."""

import math
from types import SimpleNamespace

import pytest
import torch
from trl.experimental.orpo import ORPOTrainer

from qlora_cli.loss.preference_loss import (
    CHOSEN_REWARDS,
    PAIR_LOSSES,
    REJECTED_REWARDS,
    dpo_losses,
    log_odds_of,
    orpo_losses,
)
from qlora_cli.settings.objectives import COMPARED_BY


def test_every_objective_of_pairs_has_a_loss() -> None:
    assert set(PAIR_LOSSES) == {name for name in COMPARED_BY if name.has_pairs}


def test_log_probabilities_are_those_of_sequences() -> None:
    nll = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    assert PAIR_LOSSES["dpo"].log_probs(nll, [2, 1, 2]).tolist() == [-3.0, -4.0, -24.0]
    assert PAIR_LOSSES["orpo"].log_probs(nll, [2, 1, 2]).tolist() == [-1.5, -4.0, -12.0]


def test_losses_and_rewards_are_those_of_the_paper() -> None:
    policy = torch.tensor([-10.0, -20.0, -30.0, -12.0], requires_grad=True)
    reference = torch.tensor([-11.0, -19.0, -30.0, -10.0])
    pairs = dpo_losses(policy, reference, 0.5)
    assert pairs.metrics[CHOSEN_REWARDS].tolist() == [0.5, 0.0]
    assert pairs.metrics[REJECTED_REWARDS].tolist() == [-0.5, -1.0]
    assert pairs.losses.tolist() == pytest.approx([math.log(1 + math.exp(-1.0))] * 2)
    (gradient,) = torch.autograd.grad(pairs.losses.sum(), [policy])
    pull = 0.5 / (1 + math.exp(1.0))
    assert gradient.tolist() == pytest.approx([-pull, pull, -pull, pull])


def test_the_base_itself_loses_the_logarithm_of_two() -> None:
    log_probs = torch.tensor([-3.0, -9.0])
    assert dpo_losses(log_probs, log_probs, 0.1).losses.item() == pytest.approx(math.log(2))


def test_odds_ratios_rewards_and_gradients_are_those_of_trl() -> None:
    ours = torch.tensor([-0.01, -2.5, -0.6, -0.7, -3.0, -0.2], requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    chosen, rejected = theirs.view(-1, 2).unbind(1)
    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device=torch.device("cpu")))
    losses, *rewards, log_sigmoid, log_odds = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    pairs = orpo_losses(ours, None, 0.3)
    torch.testing.assert_close(pairs.losses, -chosen - losses, rtol=1e-5, atol=1e-6)
    for name, reward in zip((CHOSEN_REWARDS, REJECTED_REWARDS), rewards, strict=True):
        torch.testing.assert_close(pairs.metrics[name], reward, rtol=0, atol=0)
    torch.testing.assert_close(pairs.metrics["log_odds_ratio"].mean(), log_sigmoid, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pairs.metrics["log_odds_chosen"].mean(), log_odds, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(pairs.losses.sum(), [ours]),
        torch.autograd.grad((-chosen - losses).sum(), [theirs]),
        rtol=1e-5,
        atol=1e-6,
    )


def test_odds_are_finite_where_a_probability_rounds_to_0_or_1() -> None:
    log_probs = torch.tensor([0.0, -1e-9, -1e-6, -0.5, -50.0, -1e4], requires_grad=True)
    odds = log_odds_of(log_probs)
    exact = [math.log(math.exp(value) / -math.expm1(value)) for value in (-1e-6, -0.5, -50.0)]
    assert odds[2:5].tolist() == pytest.approx(exact, rel=1e-5)
    assert odds[0] == odds[1] > odds[2]
    (gradient,) = torch.autograd.grad(odds.sum(), [log_probs])
    assert bool(gradient.isfinite().all())
    assert bool(odds.isfinite().all())
