"""The divergence of logits, compared with values computed by hand, also with forbidden tokens."""

import math

import pytest
import torch

from qlora_cli.merging.verifying.divergence import PIECE_TOKENS, divergence

TOKENS = 2 * PIECE_TOKENS + 5


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn((TOKENS, 11), generator=torch.Generator().manual_seed(seed))


TARGETS = torch.arange(TOKENS) % 11


def test_identical_logits_do_not_diverge() -> None:
    measured = divergence(logits(), logits().clone(), TARGETS)
    assert (measured.max_logit_difference, measured.mean_logit_difference, measured.max_kl, measured.mean_kl) == (
        0,
        0,
        0,
        0,
    )
    assert measured.top_token_agreement == 1
    assert measured.num_tokens == TOKENS
    assert measured.perplexity == measured.reference_perplexity


def test_it_is_the_divergence_of_the_distributions_averaged_over_tokens() -> None:
    one, other = logits(), logits(1)
    measured = divergence(one, other, TARGETS)
    p, q = one.softmax(1), other.softmax(1)
    kl = (p * (p / q).log()).sum(1)
    assert measured.mean_kl == pytest.approx(float(kl.mean()), rel=1e-5)
    assert measured.max_kl == pytest.approx(float(kl.max()), rel=1e-5)
    assert measured.max_logit_difference == pytest.approx(float((one - other).abs().max()))
    assert measured.mean_logit_difference == pytest.approx(float((one - other).abs().mean()), rel=1e-5)
    assert measured.top_token_agreement == pytest.approx(float((one.argmax(1) == other.argmax(1)).float().mean()))


def test_two_tokens_match_values_computed_by_hand() -> None:
    one = torch.tensor([[math.log(0.75), math.log(0.25)]])
    other = torch.tensor([[math.log(0.5), math.log(0.5)]])
    measured = divergence(one, other, torch.tensor([1]))
    assert measured.mean_kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert measured.reference_perplexity == pytest.approx(4)
    assert measured.perplexity == pytest.approx(2)


def test_tokens_that_nothing_follows_do_not_count_for_perplexity() -> None:
    targets = TARGETS.clone()
    targets[::2] = -100
    measured = divergence(logits(), logits(1), targets)
    expected = torch.nn.functional.cross_entropy(logits(1)[1::2], TARGETS[1::2]).exp()
    assert measured.perplexity == pytest.approx(float(expected), rel=1e-5)


def test_a_token_that_only_one_forbids_is_an_infinite_divergence() -> None:
    one = logits()
    one[:, 3] = -math.inf
    targets = torch.where(TARGETS == 3, -100, TARGETS)
    same = divergence(one, one.clone(), targets)
    assert same.mean_kl == same.max_logit_difference == 0
    apart = divergence(logits(), one, targets)
    assert apart.mean_kl == math.inf
    assert apart.max_logit_difference == math.inf


def test_nan_is_not_hidden() -> None:
    broken = logits()
    broken[70, 2] = math.nan
    measured = divergence(logits(), broken, TARGETS)
    assert math.isnan(measured.mean_kl)
    assert math.isnan(measured.max_logit_difference)
    assert not measured.mean_kl <= 1e-3
