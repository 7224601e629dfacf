"""Measure the divergence of one model's predictions from another's, token by token."""

from collections.abc import Iterator

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from qlora_cli.merging.merge_result import Divergence

PIECE_TOKENS = 64  # compared at a time, to avoid a copy of all logits


@torch.no_grad()
def divergence(reference: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> Divergence:
    """Return the divergence of the logits `other` from `reference`, both `(tokens, vocabulary)` in fp32.

    `targets`, `(tokens,)`, are the actual next tokens, -100 where there is none; perplexities are over these.
    """
    differences, divergences, agreements, losses, other_losses = [], [], [], [], []
    largest = 0.0
    for one, two, target in _pieces(reference, other, targets):
        # A forbidden token has an infinite logit; if both models forbid it, they do not differ.
        difference = torch.where(one == two, 0.0, (one - two).abs())
        largest = max(largest, float(difference.max())) if not torch.isnan(difference).any() else float("nan")
        differences.append(difference.mean(1))
        log_one, log_two = log_softmax(one.double(), 1), log_softmax(two.double(), 1)
        pointwise = kl_div(log_two, log_one, reduction="none", log_target=True)
        divergences.append(torch.where(log_one.isneginf(), 0.0, pointwise).sum(1))
        agreements.append((one.argmax(1) == two.argmax(1)).float())
        losses.append(cross_entropy(one, target, reduction="none")[target != -100])
        other_losses.append(cross_entropy(two, target, reduction="none")[target != -100])
    kl = torch.cat(divergences).clamp_min(0)  # rounding may make it negative
    return Divergence(
        num_tokens=len(reference),
        max_logit_difference=largest,
        mean_logit_difference=float(torch.cat(differences).mean()),
        max_kl=float(kl.max()),
        mean_kl=float(kl.mean()),
        median_kl=float(kl.median()),
        top_token_agreement=float(torch.cat(agreements).mean()),
        reference_perplexity=float(torch.cat(losses).mean().exp()),
        perplexity=float(torch.cat(other_losses).mean().exp()),
    )


def _pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(torch.split(tensor, PIECE_TOKENS) for tensor in tensors), strict=True)
