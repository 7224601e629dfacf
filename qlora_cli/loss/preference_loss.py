"""The losses of pairs by the log-probabilities of their answers.

DPO: arXiv 2305.18290, section 4. ORPO: arXiv 2403.07691, section 4.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

CHOSEN_REWARDS, REJECTED_REWARDS = "rewards/chosen", "rewards/rejected"
CHOSEN_LOG_PROBS, REJECTED_LOG_PROBS = "logps/chosen", "logps/rejected"
ACCURACIES, MARGINS = "rewards/accuracies", "rewards/margins"
NLL, LOG_SIGMOID = "nll_loss", "log_odds_ratio"  # of ORPO; TRL names the latter after what it is a function of


@dataclass(frozen=True, kw_only=True, eq=False)
class PairLosses:
    """The losses of pairs, with a gradient, and their metrics by TRL's names, without one; all `(pairs,)`, in fp32."""

    losses: torch.Tensor
    metrics: Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class PairLoss:
    """How the answers of pairs are compared.

    Attributes:
        compute: Returns the losses of pairs whose sequences, chosen and rejected in turn, have these log-probabilities
            by the trained model and by the reference, `(2 * pairs,)` each, and of beta. There is no reference for a
            loss that needs none.
        is_by_token: Whether the log-probability of an answer is the mean over its tokens, or else the sum.
    """

    compute: Callable[[torch.Tensor, torch.Tensor | None, float], PairLosses]
    is_by_token: bool

    def log_probs(self, nll: torch.Tensor, num_trained: Sequence[int]) -> torch.Tensor:
        """Return the log-probability of each sequence, `(sequences,)`.

        `nll` are those of the trained tokens of all sequences, `(tokens,)`, of which each has `num_trained`, in order.
        They are added sequence by sequence, so that the order of the sum, and its rounding, is the same in each run.
        """
        return log_probs_of(nll, num_trained, is_by_token=self.is_by_token)


def log_probs_of(nll: torch.Tensor, num_trained: Sequence[int], *, is_by_token: bool = False) -> torch.Tensor:
    """Return the log-probability of each sequence, see `PairLoss.log_probs`."""
    sequences = torch.split(nll, list(num_trained))
    return -torch.stack([one.mean() if is_by_token else one.sum() for one in sequences])


def dpo_losses(policy: torch.Tensor, reference: torch.Tensor | None, beta: float) -> PairLosses:
    """Return the losses of DPO.

    The reward of an answer is `beta` times how much more likely, in nats, it is by the trained model than by the
    reference.
    """
    assert reference is not None, "the objective has one"
    chosen, rejected = (beta * (policy - reference)).view(-1, 2).unbind(1)
    return PairLosses(losses=-logsigmoid(chosen - rejected), metrics=_metrics(policy, chosen, rejected))


def orpo_losses(policy: torch.Tensor, reference: torch.Tensor | None, beta: float) -> PairLosses:
    """Return the losses of ORPO: the NLL of a token of the chosen answer, and `beta` times that of the preference.

    The latter is by the ratio of the odds of both answers, whose probabilities are those of a token: the geometric
    mean. The reward of an answer is `beta` times the log-probability of a token.
    """
    assert reference is None, "the objective has none"
    chosen, rejected = policy.view(-1, 2).unbind(1)
    log_odds = log_odds_of(policy).view(-1, 2)
    log_ratio = log_odds[:, 0] - log_odds[:, 1]
    log_sigmoid = logsigmoid(log_ratio)
    of_orpo = {NLL: -chosen, LOG_SIGMOID: log_sigmoid, "log_odds_chosen": log_ratio}
    return PairLosses(
        losses=-chosen - beta * log_sigmoid,
        metrics={
            **_metrics(policy, beta * chosen, beta * rejected),
            **{name: value.detach() for name, value in of_orpo.items()},
        },
    )


def log_odds_of(log_probs: torch.Tensor) -> torch.Tensor:
    """Return `log(p / (1 - p))` of logarithms of p; a p that rounds to 1 in fp32 has the odds of the next smaller one.

    In one formula for all: `torch.where` of two has a gradient of NaN where the unused one is infinite.
    """
    below_one = log_probs.clamp(max=-torch.finfo(torch.float32).eps)
    return below_one - torch.log(-torch.expm1(below_one))


def _metrics(policy: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the metrics of any objective: the rewards of both answers, `(pairs,)`, and their log-probabilities."""
    of_chosen, of_rejected = policy.detach().view(-1, 2).unbind(1)
    return {
        CHOSEN_REWARDS: chosen.detach(),
        REJECTED_REWARDS: rejected.detach(),
        CHOSEN_LOG_PROBS: of_chosen,
        REJECTED_LOG_PROBS: of_rejected,
    }


# By the value of `training.objective`.
PAIR_LOSSES: Mapping[str, PairLoss] = {
    "dpo": PairLoss(compute=dpo_losses, is_by_token=False),
    "orpo": PairLoss(compute=orpo_losses, is_by_token=True),
}
