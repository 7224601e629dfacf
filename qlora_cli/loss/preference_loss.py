"""The loss of pairs by the log-probabilities of their answers: that of DPO (arXiv 2305.18290, section 4)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, kw_only=True, eq=False)
class PairLosses:
    """The losses of pairs, with a gradient, and the rewards of both answers, without one; all `(pairs,)`, in fp32."""

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor


def log_probs_of_sequences(nll: torch.Tensor, num_trained: Sequence[int]) -> torch.Tensor:
    """Return the log-probability of each sequence, `(sequences,)`, the sum over its trained tokens.

    `nll` are those of the trained tokens of all sequences, `(tokens,)`, of which each has `num_trained`, in order.
    They are added sequence by sequence, so that the order of the sum, and its rounding, is the same in each run.
    """
    return -torch.stack([of_one.sum() for of_one in torch.split(nll, list(num_trained))])


def dpo_losses(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> PairLosses:
    """Return the losses of pairs whose sequences, chosen and rejected in turn, have these log-probabilities.

    `policy` are those of the trained model, `reference` of the one that it is compared with, both `(2 * pairs,)`. The
    reward of an answer is `beta` times how much more likely, in nats, it is by the former than by the latter.
    """
    rewards = beta * (policy - reference).view(-1, 2)
    chosen, rejected = rewards.unbind(1)
    return PairLosses(
        losses=-logsigmoid(chosen - rejected),
        chosen_rewards=chosen.detach(),
        rejected_rewards=rejected.detach(),
    )
